"""Defines every error that modmill raises on purpose.

ModmillError
├── UserError               the command line prints one line and exits 2
│   ├── ConfigError         a pipeline file, an option, an unknown name
│   ├── WorkspaceError      no workspace there, a newer format, another writer holds it
│   └── QueryError          SQL that DuckDB refuses
├── RowError                one row's fault; it becomes a failed row, the rest goes on
│   ├── SourceError         the file is gone, or its bytes changed since ingest
│   │   └── FetchError      a URL could not be fetched; FetchRefused: it must not be
│   ├── DecodeError         the bytes are no whole image of a known kind, or are over the pixel cap
│   ├── LabelError          a labeler refused the row
│   └── TokenizeError       a tokenizer refused the row
├── ShardError              a shard or sidecar is missing, truncated or not what the log says
├── LogError                the log has a gap, a broken chain, or an entry that cannot be read
├── DeadlineExceeded        a batch took longer than `engine.batch_deadline_s`
└── TooManyFailures         over `max_failed_fraction`; exit code 3

A message says what is wrong with the value, what was expected, where, and what to do about it.
"""

import difflib
from collections.abc import Iterable


class ModmillError(Exception):
    """Stands for everything that modmill raises on purpose: catch it to catch them all."""


class UserError(ModmillError):
    """Reports something that the person who typed the command can mend."""


class ConfigError(UserError):
    """Reports a pipeline file, an option or a name that is not right."""


class WorkspaceError(UserError):
    """Reports a workspace that is missing, is of a newer format, or is held by another writer."""


class QueryError(UserError):
    """Reports SQL that DuckDB refuses."""


class RowError(ModmillError):
    """Reports the fault of one row. The engine writes it to the failed file and goes on."""


class SourceError(RowError):
    """Reports that the source file cannot be read, or is not the one that was ingested."""


class FetchError(SourceError):
    """Reports that a URL could not be fetched, or that what it gave is no image within the caps."""


class FetchRefused(FetchError):
    """Reports a URL that must not be fetched: its scheme or address is not allowed, or its owner says no."""


class DecodeError(RowError):
    """Reports that the bytes are not one whole image of a known kind within the pixel cap."""


class LabelError(RowError):
    """Reports that a labeler cannot label this row."""


class TokenizeError(RowError):
    """Reports that a tokenizer cannot encode this row."""


class ShardError(ModmillError):
    """Reports a shard that is missing, truncated, or other than the log says of it."""


class LogError(ModmillError):
    """Reports that the commit log has a gap, a broken chain, or an entry that cannot be read."""


class DeadlineExceeded(ModmillError):
    """Reports a batch that takes longer than the pipeline file allows: its worker is taken to hang."""


class TooManyFailures(ModmillError):
    """Reports that more rows failed than the pipeline file allows."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a sentence for an unknown name: it gives the nearest known name, or else all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names) or 'none'}"
