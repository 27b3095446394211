"""What a corpus's source holds, in a fixed order, read in place and never copied unless packing is asked for.

A folder's or glob's samples are its image files, or its documents (`engine/sources/documents.py`); beside each are its source
columns (`engine/sources/columns.py`). Images may also lie in tars (`engine/sources/tars.py`) and Parquet files
(`engine/sources/parquet.py`), or be listed by URL (`engine/sources/urls.py`). Sources may lie on this machine or on any
fsspec store.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.pipeline.config import CorpusConfig
from engine.sources import documents, listing, parquet, tars, urls
from engine.sources.columns import image_columns
from engine.sources.documents import read_documents
from engine.sources.listing import Listed, Notes, key_of, uri
from manifests.errors import ConfigError
from manifests.store.uris import without_credentials

__all__ = ["IMAGE_SUFFIXES", "Listed", "Scan", "key_of", "read_bytes", "read_documents", "scan", "uri"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".tif", ".tiff", ".gif", ".bmp")


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
    """Lists a corpus's source: images by key, documents by path and row, what lies in tars and tables in its order there.

    Raises ConfigError where there is nothing of the corpus's kind, a table does not fit, or two samples have one key.
    """
    notes = Notes()
    listed = listing.list_source(config.source, notes)
    root = listed.root
    columns: Callable[[str], dict[str, Any]]
    if config.kind == "text":
        samples, columns = _documents(config, listed, notes)
    elif config.url is not None:
        lists = listed.with_suffix(config.source, urls.SUFFIXES, "lists of URLs")
        samples, columns = urls.scan_urls(root, lists, config, notes)
        root = ""
    elif packed := _packed(listed, notes):
        if config.table is not None:
            raise ConfigError("table is for folders of images; what lies in tars or Parquet has its columns there")
        if listing.suffix(packed[0].path) in tars.SUFFIXES:
            samples = tars.scan_tars(root, packed, config.image, config.key, IMAGE_SUFFIXES, notes)
            columns = tars.TarColumns(root, samples, notes)
        else:
            samples = parquet.scan_parquet(root, packed, config.image, config.key, notes)
            columns = parquet.ParquetColumns(root, config.key, config.image)
    else:
        samples, columns = _images(config, listed, notes)
    _check_unique(samples, config.key)
    return Scan(root=root, samples=samples, read_columns=columns, findings=notes)


def _packed(listed: listing.Listing, notes: Notes) -> list[listing.File]:
    """The tars, else the Parquet files, of a source without images; a table beside images or tars is none."""
    if any(listing.suffix(file.path) in IMAGE_SUFFIXES for file in listed.chosen):
        return []
    compressed = [file for file in listed.chosen if file.path.lower().endswith(tars.COMPRESSED)]
    for suffixes in (tars.SUFFIXES, parquet.SUFFIXES):
        found = [file for file in listed.chosen if listing.suffix(file.path) in suffixes]
        if found:
            for file in compressed:
                notes.add("tar", "compressed, passed over (unpack it: members are read in place)", file.path)
            return found
    if compressed:
        raise ConfigError(
            f"{compressed[0].path} is a compressed tar, and a member of such cannot be read without all before it; unpack it "
            "(images gain nothing from compression): gunzip, unxz or zstd -d give a .tar, which is read in place"
        )
    return []


def _documents(
    config: CorpusConfig, listed: listing.Listing, notes: Notes
) -> tuple[list[Listed], Callable[[str], dict[str, Any]]]:
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
    return samples, documents.DocumentColumns(listed.root, config)


def _images(
    config: CorpusConfig, listed: listing.Listing, notes: Notes
) -> tuple[list[Listed], Callable[[str], dict[str, Any]]]:
    images = listed.with_suffix(config.source, IMAGE_SUFFIXES, "images")
    for option in ("key", "image"):
        if getattr(config, option) is not None and (option == "image" or config.table is None):
            what = (
                "a column of `table`, but there is no table"
                if option == "key"
                else "what holds images in Parquet or tars"
            )
            raise ConfigError(f"{option} names {what}; the source is a folder of images")
    samples = [
        Listed(key=key_of(image.path), source=image.path, size_bytes=image.size_bytes, mtime_ns=image.mtime_ns)
        for image in images
    ]
    columns = image_columns(listed.root, listed.files, images, config.table, config.key, notes)
    return sorted(samples, key=lambda sample: sample.key), columns


def read_bytes(root: str, source: str) -> bytes:
    """The bytes of an image file. Raises SourceError where it is gone or cannot be read."""
    return listing.read_file(root, source)


def _check_unique(samples: Sequence[Listed], field: str | None) -> None:
    first: dict[str, str] = {}
    for sample in samples:
        if sample.key in first:
            reason = f"the field {field!r} must be unique" if field else "rename one of them"
            if sample.offset is not None:
                reason = "with `key: source` keys are made of tar and name"
            raise ConfigError(f"{sample.source} has the key {sample.key!r}, as has {first[sample.key]}; {reason}")
        first[sample.key] = sample.source
