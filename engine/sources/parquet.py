"""Lists and reads images in Parquet files: a column of bytes, or of Hugging Face's struct {bytes, path}.

Files are read row group by row group.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from engine.pipeline.sections import CorpusConfig
from engine.sources.listing import File, Listed, Notes, Scanned, key_of, open_file
from engine.sources.values import key_text, plain
from manifests.errors import ConfigError, SourceError, nearest

SUFFIXES = (".parquet",)
_NAMES = ("image", "jpg", "jpeg", "png", "webp", "img", "bytes", "content")
_IMAGE_ROWS = 16
_COLUMN_ROWS = 4096
_BUFFER_BYTES = 8 << 20


def scan_parquet(root: str, files: Sequence[File], config: CorpusConfig, notes: Notes) -> Scanned:
    """Lists the rows of all files, in their order; `image` names the column of the bytes, else it is found by name and type.

    `key` names a column whose values are keys. The sizes of images are not known before they are read, and None.
    Raises ConfigError if a file has no column of images, or a row no key.
    """
    image, key = config.image, config.key
    samples: list[Listed] = []
    for file in files:
        with open_parquet(root, file.path) as parquet:
            schema = parquet.schema_arrow
            column = image_column(file.path, schema, image)
            if key is not None and key not in schema.names:
                raise ConfigError(f"{file.path} has no column {key!r} (`key`); {nearest(key, schema.names)}")
            for name in schema.names:
                if name != column and is_bytes(schema.field(name).type):
                    notes.add("column", f"of bytes beside the images ({name}), left out", file.path)
            values = _keys(parquet, key, file.path) if key else (None for _ in range(parquet.metadata.num_rows))
            for number, value in enumerate(values):
                source = f"{file.path}#{number}"
                samples.append(
                    Listed(
                        key=key_of(source) if value is None else value,
                        source=source,
                        size_bytes=None,
                        mtime_ns=file.mtime_ns,
                    )
                )
    if not samples:
        raise ConfigError(f"the {len(files)} Parquet files have no rows")
    return samples, ParquetColumns(root, key, image)


def image_column(path: str, schema: Any, wanted: str | None) -> str:
    """Returns the name of the image column. Raises ConfigError if there is none, or if several could be it."""
    of_bytes = [name for name in schema.names if is_bytes(schema.field(name).type)]
    if wanted is not None:
        if wanted in of_bytes:
            return wanted
        found = f"has {schema.field(wanted).type} in the" if wanted in schema.names else "has no"
        raise ConfigError(
            f"{path} {found} column {wanted!r} (`image`); expected bytes, or a struct with a field `bytes`; "
            f"such columns are {', '.join(of_bytes) or 'none'}"
        )
    named = [name for name in _NAMES if name in of_bytes]
    if named or len(of_bytes) == 1:
        return (named or of_bytes)[0]
    if of_bytes:
        raise ConfigError(f"{path} has several columns of bytes: {', '.join(of_bytes)}; say which with `image:`")
    raise ConfigError(
        f"{path} has no column of image bytes, its columns are {', '.join(schema.names)}; if one of them holds URLs, "
        "name it with `url:`"
    )


def is_bytes(kind: Any) -> bool:
    """Tells whether a type of Arrow is bytes, or a struct with bytes in the field `bytes`."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and is_bytes(kind.field(place).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


class ParquetColumns:
    """Reads the other columns of rows; quick in their order, as the last batch stays in memory."""

    def __init__(self, root: str, key: str | None, image: str | None) -> None:
        self._root = root
        self._key = key
        self._image = image
        self._path = ""
        self._batches: Iterator[tuple[int, list[dict[str, Any]]]] = iter(())
        self._rows: tuple[int, list[dict[str, Any]]] = (0, [])

    def __call__(self, source: str) -> dict[str, Any]:
        path, _, number = source.rpartition("#")
        wanted = int(number)
        if path != self._path or wanted < self._rows[0]:
            self._path, self._batches, self._rows = path, self._read(path), (0, [])
        while wanted >= self._rows[0] + len(self._rows[1]):
            following = next(self._batches, None)
            if following is None:
                return {}
            self._rows = following
        return self._rows[1][wanted - self._rows[0]]

    def _read(self, path: str) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        with open_parquet(self._root, path) as parquet:
            schema = parquet.schema_arrow
            images = {name for name in schema.names if is_bytes(schema.field(name).type)}
            names = [name for name in schema.names if name not in images and name != self._key]
            column = image_column(path, schema, self._image) if images else ""
            kind = schema.field(column).type if column else None
            with_path = kind is not None and hasattr(kind, "get_field_index") and kind.get_field_index("path") >= 0
            if with_path:
                names.append(f"{column}.path")
            begin = 0
            for batch in _batches(parquet, names, _COLUMN_ROWS):
                rows = [plain(row) for row in batch.to_pylist()]
                for row in rows if with_path else ():
                    row[f"{column}_path"] = row.pop(column)["path"] if row[column] else row.pop(column)
                yield begin, rows
                begin += batch.num_rows


class ParquetImages:
    """Reads images of some rows of some files, from any thread; of a row group it holds only what is asked for."""

    def __init__(self, root: str, config: CorpusConfig, rows: Mapping[str, set[int]]) -> None:
        self._files = {path: _FileImages(root, path, config.image, numbers) for path, numbers in rows.items()}

    def read(self, path: str, number: int) -> bytes | None:
        """Returns the bytes in a row, None if it has none. Raises SourceError if the row is gone or cannot be read."""
        return self._files[path].read(number)

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()


class _FileImages:
    """Reads one file forward, and holds the rows that it passed and that are still wanted."""

    def __init__(self, root: str, path: str, image: str | None, wanted: set[int]) -> None:
        self._root = root
        self._path = path
        self._image = image
        self._wanted = wanted
        self._passed: dict[int, bytes | None] = {}
        self._at = 0
        self._reader: Iterator[None] | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            self._reader = None
            self._passed.clear()

    def read(self, number: int) -> bytes | None:
        import pyarrow as pa

        with self._lock:
            try:
                if number not in self._passed and (self._reader is None or number < self._at):
                    self._reader = self._forward(number)
                while number not in self._passed:
                    if self._reader is None or next(self._reader, self) is self:
                        self._reader = None
                        raise SourceError(f"{self._path}#{number} is gone: the file has fewer rows now")
            except (pa.ArrowException, OSError, ValueError, ConfigError) as error:
                self._reader = None
                raise SourceError(f"{self._path}#{number} cannot be read: {error}") from error
            return self._passed.pop(number)

    def _forward(self, first: int) -> Iterator[None]:
        """Goes through the row groups that hold wanted rows, from that of row `first` on; a batch a step."""
        with open_parquet(self._root, self._path) as parquet:
            column = image_column(self._path, parquet.schema_arrow, self._image)
            begin = 0
            for group in range(parquet.metadata.num_row_groups):
                end = begin + parquet.metadata.row_group(group).num_rows
                if end > first and any(number in self._wanted for number in range(max(begin, first), end)):
                    self._at = begin
                    names = [column]
                    for batch in _batches(parquet, names, _IMAGE_ROWS, [group]):
                        self._take(batch.column(0), first)
                        yield
                begin = end
            self._at = begin

    def _take(self, column: Any, first: int) -> None:
        for place in range(len(column)):
            number = self._at + place
            if number in self._wanted and number >= first:
                value = column[place].as_py()
                self._passed[number] = value.get("bytes") if isinstance(value, dict) else value
        self._at += len(column)


def _batches(parquet: Any, names: Sequence[str], rows: int, groups: Sequence[int] | None = None) -> Iterator[Any]:
    groups = range(parquet.metadata.num_row_groups) if groups is None else groups
    # One group at a time, without reading ahead: a group of images may be as big as the memory.
    for group in groups:
        yield from parquet.iter_batches(rows, row_groups=[group], columns=list(names), use_threads=False)


@contextmanager
def open_parquet(root: str, path: str) -> Iterator[Any]:
    """Opens a Parquet file below a source's root, and closes it after. Raises ConfigError if it is not one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        stream = open_file(root, path)
    except SourceError as error:
        raise ConfigError(str(error)) from error
    try:
        try:
            parquet = pq.ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"{path} cannot be read as Parquet: {error}; mend the file or move it away") from error
        yield parquet
    finally:
        with suppress(OSError):
            stream.close()


def _keys(parquet: Any, key: str, path: str) -> Iterator[str]:
    values = (value for batch in _batches(parquet, [key], _COLUMN_ROWS) for value in batch.column(0).to_pylist())
    for number, value in enumerate(values):
        yield key_text(value, f"{path}#{number}: the key column {key!r}")
