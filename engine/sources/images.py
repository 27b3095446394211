"""Lists the images of a source: files of a folder, or what lies in tars, in Parquet files or at URLs.

A format that holds images within its files is a row of `FORMATS`, which listing and reading both go by.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from engine.pipeline.sections import CorpusConfig
from engine.sources import listing, parquet, tars, urls
from engine.sources.columns import SIDECARS, image_columns
from engine.sources.listing import IMAGE_SUFFIXES, File, Listed, Listing, Notes, Scanned, key_of
from manifests.errors import ConfigError
from manifests.store.uris import absolute

_BESIDE = ("tar", "beside loose images, passed over (a corpus of its own takes what is in them)")


class RowImages(Protocol):
    """Reads images that are rows of files, from any thread."""

    def read(self, path: str, number: int) -> bytes | None:
        """Returns the bytes in a row, None if it has none. Raises SourceError if it cannot be read."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class ImageFormat:
    """Describes files that hold images.

    `scan` lists their samples. `open_rows` opens the rows that are asked for, by file; it is None if samples say at
    which offset of their file they begin.
    """

    suffixes: tuple[str, ...]
    scan: Callable[[str, Sequence[File], CorpusConfig, Notes], Scanned]
    open_rows: Callable[[str, CorpusConfig, Mapping[str, set[int]]], RowImages] | None = None


# A source is of the first format that it has files of: a Parquet file beside images or tars is a table.
FORMATS = (
    ImageFormat(suffixes=tars.SUFFIXES, scan=tars.scan_tars),
    ImageFormat(suffixes=parquet.SUFFIXES, scan=parquet.scan_parquet, open_rows=parquet.ParquetImages),
)


def scan_images(config: CorpusConfig, listed: Listing, notes: Notes) -> Scanned:
    """Lists the images of a source, loose ones by key. Raises ConfigError if there are none, or a table does not fit."""
    if config.url is not None:
        lists = listed.with_suffix(config.source, urls.SUFFIXES, "lists of URLs")
        for file in listed.others(lists):
            notes.pass_over(file)
        return urls.scan_urls(listed.root, lists, config, notes)
    if any(listing.suffix(file.path) in IMAGE_SUFFIXES for file in listed.chosen):
        return _scan_files(config, listed, notes)
    for found in FORMATS:
        files = [file for file in listed.chosen if listing.suffix(file.path) in found.suffixes]
        if not files:
            continue
        if config.table is not None:
            raise ConfigError("table is for folders of images; what lies in tars or Parquet has its columns there")
        for file in listed.others(files):
            notes.pass_over(file, tars.UNPACK if _is_compressed(file) else None)
        return found.scan(listed.root, files, config, notes)
    if compressed := next((file.path for file in listed.chosen if _is_compressed(file)), None):
        raise ConfigError(
            f"{compressed} is a compressed tar, whose members cannot be read in place; unpack it "
            "(images gain nothing from compression): gunzip, unxz or zstd -d give a .tar"
        )
    return _scan_files(config, listed, notes)


def _scan_files(config: CorpusConfig, listed: Listing, notes: Notes) -> Scanned:
    images = listed.with_suffix(config.source, IMAGE_SUFFIXES, "images")
    if config.key is not None and config.table is None:
        raise ConfigError("key names a column of `table`, but there is no table; the source is a folder of images")
    if config.image is not None:
        raise ConfigError("image names what holds images in Parquet or tars; the source is a folder of images")
    samples = [
        Listed(key=key_of(image.path), source=image.path, size_bytes=image.size_bytes, mtime_ns=image.mtime_ns)
        for image in images
    ]
    columns = image_columns(listed.root, listed.files, images, config.table, config.key, notes)
    _pass_over_others(config, listed, images, notes)
    return sorted(samples, key=lambda sample: sample.key), columns


def _pass_over_others(config: CorpusConfig, listed: Listing, images: Sequence[File], notes: Notes) -> None:
    """Adds notes of the files beside loose images that are neither sidecars of them nor the table."""
    stems = {listing.stem(image.path) for image in images}
    table = absolute(config.table, Path.cwd()) if config.table else None
    for file in listed.others(images):
        kind = listing.suffix(file.path)
        is_sidecar = kind in SIDECARS and listing.stem(file.path) in stems
        if is_sidecar or listing.uri(listed.root, file.path) == table:
            continue
        notes.pass_over(file, _BESIDE if kind in tars.SUFFIXES or _is_compressed(file) else None)


def _is_compressed(file: File) -> bool:
    return file.path.lower().endswith(tars.COMPRESSED)
