"""What a corpus's source holds, in a fixed order, read in place and never copied.

A folder's or glob's samples are its image files, or its documents (`engine/documents.py`); beside each are its source
columns (`engine/source_columns.py`). Sources may lie on this machine or on any fsspec store.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine import documents, listing
from engine.config import CorpusConfig
from engine.documents import read_documents
from engine.listing import Notes, uri
from engine.pipeline_file import without_credentials
from engine.source_columns import image_columns
from manifests.errors import ConfigError

__all__ = ["IMAGE_SUFFIXES", "Listed", "Scan", "read_bytes", "read_documents", "scan", "uri"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".tif", ".tiff", ".gif", ".bmp")
_KEY_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One sample of a source.

    `source` is its path below the root, or `docs.jsonl#17` for a row of a file. `size_bytes` counts the image's file, or
    the document's text in UTF-8. `mtime_ns` is the file's time of change, None where it is not local.
    """

    key: str
    source: str
    size_bytes: int
    mtime_ns: int | None


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A source's samples in the corpus's order, and their source columns.

    `root` is a folder of this machine or a URI as the pipeline file has it, credentials included: do not record it.
    """

    root: str
    samples: list[Listed]
    read_columns: Callable[[str], dict[str, Any]]
    findings: Notes

    def columns(self, listed: Listed) -> dict[str, Any]:
        """The source columns of one sample, read now. Values are JSON values; what cannot be read becomes a note."""
        return self.read_columns(listed.source)

    @property
    def notes(self) -> list[str]:
        """What the user should know, a line a kind; it grows as columns are read."""
        return self.findings.lines()


def scan(config: CorpusConfig) -> Scan:
    """Lists a corpus's source: images by key, documents by path and row.

    Raises ConfigError where there is nothing of the corpus's kind, a table does not fit, or two samples have one key.
    """
    notes = Notes()
    listed = listing.list_source(config.source, notes)
    if config.kind == "text":
        files = listed.with_suffix(config.source, documents.SUFFIXES, "documents")
        samples = [
            Listed(
                key=document.key or key_of(document.source),
                source=document.source,
                size_bytes=document.text_bytes,
                mtime_ns=document.file.mtime_ns,
            )
            for document in documents.scan_documents(listed.root, files, config, notes)
        ]
        if not samples:
            raise ConfigError(
                f"source {without_credentials(config.source)} holds no documents: its {len(files)} files have no rows"
            )
        columns: Callable[[str], dict[str, Any]] = documents.DocumentColumns(listed.root, config)
    else:
        images = listed.with_suffix(config.source, IMAGE_SUFFIXES, "images")
        samples = sorted(
            (
                Listed(key=key_of(image.path), source=image.path, size_bytes=image.size_bytes, mtime_ns=image.mtime_ns)
                for image in images
            ),
            key=lambda sample: sample.key,
        )
        columns = image_columns(listed.root, listed.files, images, config.table, config.key, notes)
    _check_unique(samples, config.key)
    return Scan(root=listed.root, samples=samples, read_columns=columns, findings=notes)


def key_of(source: str) -> str:
    """The key of a sample that has none of its own: 16 hex digits of the sha256 of its source's name."""
    return hashlib.sha256(source.encode()).hexdigest()[:_KEY_DIGITS]


def read_bytes(root: str, source: str) -> bytes:
    """The bytes of an image file. Raises SourceError where it is gone or cannot be read."""
    return listing.read_file(root, source)


def _check_unique(samples: Sequence[Listed], field: str | None) -> None:
    first: dict[str, str] = {}
    for sample in samples:
        if sample.key in first:
            reason = f"the field {field!r} must be unique" if field else "rename one of them"
            raise ConfigError(f"{sample.source} has the key {sample.key!r}, as has {first[sample.key]}; {reason}")
        first[sample.key] = sample.source
