"""Lists what a corpus's source holds, in a fixed order; nothing is copied unless packing is asked for.

How a source is listed depends on the kind of the corpus (`engine/sources/kinds.py`). Sources may lie on this machine or on any
fsspec store.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.pipeline.sections import CorpusConfig
from engine.sources import listing
from engine.sources.kinds import KINDS
from engine.sources.listing import Listed, Notes
from engine.sources.tars import tar_of
from manifests.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Scan:
    """Holds a source's samples in the corpus's order, and reads their source columns.

    `root` is a folder of this machine or a URI as the pipeline file has it, credentials included: do not record it.
    It is empty for a list of URLs.
    """

    root: str
    samples: list[Listed]
    read_columns: Callable[[str], dict[str, Any]]
    findings: Notes

    def columns(self, listed: Listed) -> dict[str, Any]:
        """Reads the source columns of one sample. Values are JSON values; what cannot be read becomes a note."""
        return self.read_columns(listed.source)

    @property
    def notes(self) -> list[str]:
        """Returns what the user should know, a line a kind; it grows as columns are read."""
        return self.findings.lines()


def scan(config: CorpusConfig) -> Scan:
    """Lists a corpus's source: images by key, documents by path and row, what lies in tars and tables in its order there.

    A sample whose key stands earlier is passed over. Raises ConfigError if there is nothing of the corpus's kind, a table does
    not fit, or half of a file's samples have a key that stands earlier.
    """
    notes = Notes()
    try:
        listed = listing.list_source(config.source, notes, follow_links=config.follow_links)
        samples, columns = KINDS[config.kind].scan(config, listed, notes)
    except ConfigError as error:
        out = notes.counts.get(("link", listing.LEADS_OUT))
        if out is None:
            raise
        raise ConfigError(f"{error}; {len(out)} links {listing.LEADS_OUT}: {out[0]}") from error
    samples = _unique(samples, config, notes)
    root = "" if config.url is not None else listed.root
    return Scan(root=root, samples=samples, read_columns=columns, findings=notes)


def _unique(samples: list[Listed], config: CorpusConfig, notes: Notes) -> list[Listed]:
    """Returns the samples whose key stands for the first time. Raises ConfigError if they are the fewer ones of a file."""
    first: dict[str, str] = {}
    again = [sample for sample in samples if first.setdefault(sample.key, sample.source) != sample.source]
    if not again:
        return samples
    reason = f"the field {config.key!r} must be unique" if config.key else "rename one of them"
    if again[0].offset is not None:
        reason = "with `key: source` keys are made of tar and name"
    counts = Counter(_file_of(sample, config) for sample in samples)
    for name, count in Counter(_file_of(sample, config) for sample in again).items():
        if 2 * count >= counts[name]:
            sample = next(sample for sample in again if _file_of(sample, config) == name)
            raise ConfigError(f"{sample.source} has the key {sample.key!r}, as has {first[sample.key]}; {reason}")
    for sample in again:
        notes.add("sample", f"with a key that stands earlier, passed over ({reason})", sample.source)
    return [sample for sample in samples if first[sample.key] == sample.source]


def _file_of(sample: Listed, config: CorpusConfig) -> str:
    """Returns the file that a sample is in; loose files and URLs are of one."""
    if sample.offset is not None:
        return tar_of(sample.source)
    return "" if config.url is not None else sample.source.rpartition("#")[0]
