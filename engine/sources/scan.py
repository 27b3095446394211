"""Lists what a corpus's source holds, in a fixed order; nothing is copied unless packing is asked for.

How a source is listed depends on the kind of the corpus (`engine/sources/kinds.py`). Sources may lie on this machine or on any
fsspec store.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.pipeline.sections import CorpusConfig
from engine.sources import listing
from engine.sources.kinds import KINDS
from engine.sources.listing import Listed, Notes
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

    Raises ConfigError if there is nothing of the corpus's kind, a table does not fit, or two samples have one key.
    """
    notes = Notes()
    listed = listing.list_source(config.source, notes)
    samples, columns = KINDS[config.kind].scan(config, listed, notes)
    _check_unique(samples, config.key)
    root = "" if config.url is not None else listed.root
    return Scan(root=root, samples=samples, read_columns=columns, findings=notes)


def _check_unique(samples: Sequence[Listed], field: str | None) -> None:
    first: dict[str, str] = {}
    for sample in samples:
        if sample.key in first:
            reason = f"the field {field!r} must be unique" if field else "rename one of them"
            if sample.offset is not None:
                reason = "with `key: source` keys are made of tar and name"
            raise ConfigError(f"{sample.source} has the key {sample.key!r}, as has {first[sample.key]}; {reason}")
        first[sample.key] = sample.source
