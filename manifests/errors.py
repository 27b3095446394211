"""Every error modmill raises on purpose.

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
    """The root: catch this to catch everything that modmill raises on purpose."""


class UserError(ModmillError):
    """Something that the person who typed the command can mend."""


class ConfigError(UserError):
    """A pipeline file, an option or a name that is not right."""


class WorkspaceError(UserError):
    """A workspace that is not there, is of a newer format, or is held by another writer."""


class QueryError(UserError):
    """SQL that DuckDB refuses."""


class RowError(ModmillError):
    """One row's fault. The engine writes it to the failed file and goes on."""


class SourceError(RowError):
    """The source file cannot be read, or is not the one that was ingested."""


class FetchError(SourceError):
    """A URL could not be fetched, or what it gave is no image within the caps."""


class FetchRefused(FetchError):
    """A URL that is not fetched: its scheme or address is none that may be asked, or its owner says no."""


class DecodeError(RowError):
    """The bytes are not one whole image of a known kind within the pixel cap."""


class LabelError(RowError):
    """A labeler cannot label this row."""


class TokenizeError(RowError):
    """A tokenizer cannot encode this row."""


class ShardError(ModmillError):
    """A shard is missing, truncated, or differs from what the log says of it."""


class LogError(ModmillError):
    """The commit log has a gap, a broken chain, or an entry that cannot be read."""


class DeadlineExceeded(ModmillError):
    """A batch takes longer than the pipeline file allows; its worker is taken to hang."""


class TooManyFailures(ModmillError):
    """More rows failed than the pipeline file allows."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence for an unknown name: the nearest known one, else all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names) or 'none'}"
