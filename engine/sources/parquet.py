"""Lists and reads images in Parquet files: a column of bytes, or of Hugging Face's struct {bytes, path}.

Files are read row group by row group.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from engine.pipeline.sections import CorpusConfig
from engine.sources.listing import NO_KEY, File, Listed, Notes, Scanned, check_keys, key_of, open_file
from engine.sources.values import column_names, key_text, plain_values
from manifests.errors import ConfigError, SourceError, nearest

SUFFIXES = (".parquet",)
_NAMES = ("image", "jpg", "jpeg", "png", "webp", "img", "bytes", "content")
_IMAGE_ROWS = 16
_COLUMN_ROWS = 4096
_BUFFER_BYTES = 8 << 20


def scan_parquet(root: str, files: Sequence[File], config: CorpusConfig, notes: Notes) -> Scanned:
    """Lists the rows of all files, in their order; `image` names the column of the bytes, else it is found by name and type.

    `key` names a column whose values are keys. The sizes of images are not known before they are read, and None. A file
    that cannot be read, or has no such columns, is passed over; raises ConfigError if there is no other.
    """
    samples: list[Listed] = []
    problems: list[tuple[File, ConfigError]] = []
    for file in files:
        try:
            samples += _rows(root, file, config, notes)
        except ConfigError as error:
            problems.append((file, error))
    check_keys(samples, notes)
    if not samples:
        raise problems[0][1] if problems else ConfigError(f"the {len(files)} Parquet files have no rows")
    for file, error in problems:
        notes.leave_out(file, "Parquet file", error)
    return samples, ParquetColumns(root, config.key, config.image, notes)


def _rows(root: str, file: File, config: CorpusConfig, notes: Notes) -> list[Listed]:
    """Lists the rows of a file, but those without a key. Raises ConfigError if it has no column of images or of keys."""
    key = config.key
    with open_parquet(root, file.path) as parquet:
        schema = parquet.schema_arrow
        column = image_column(file.path, schema, config.image)
        names = column_names(schema)
        if key is not None and key not in names:
            raise ConfigError(f"{file.path} has no column {key!r} (`key`); {nearest(key, names)}")
        keys = _keys(parquet, key, file.path) if key else [None] * parquet.metadata.num_rows
    for field in schema:
        if field.name not in names:
            notes.add("column", f"of a name that is empty or stands twice ({field.name!r}), left out", file.path)
        elif field.name != column and is_bytes(field.type):
            notes.add("column", f"of bytes beside the images ({field.name}), left out", file.path)
    samples = []
    for number, value in enumerate(keys):
        source = f"{file.path}#{number}"
        own = key_of(source) if key is None else key_text(value)
        if own is None:
            notes.add(*NO_KEY, f"{source}: the key column {key!r} is {value!r:.100}")
        else:
            samples.append(Listed(key=own, source=source, size_bytes=None, mtime_ns=file.mtime_ns))
    return samples


def image_column(path: str, schema: Any, wanted: str | None) -> str:
    """Returns the name of the image column. Raises ConfigError if there is none, or if several could be it."""
    kinds = {name: schema.field(name).type for name in column_names(schema)}
    of_bytes = [name for name, kind in kinds.items() if is_bytes(kind)]
    if wanted is not None:
        if wanted in of_bytes:
            return wanted
        found = (
            f"has {kinds[wanted]} in the"
            if wanted in kinds
            else "has twice the"
            if wanted in schema.names
            else "has no"
        )
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
    if pa.types.is_dictionary(kind):
        return is_bytes(kind.value_type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


class ParquetColumns:
    """Reads the other columns of rows; quick in their order, as the last batch stays in memory."""

    def __init__(self, root: str, key: str | None, image: str | None, notes: Notes) -> None:
        self._root = root
        self._key = key
        self._image = image
        self._notes = notes
        self._path = ""
        self._batches: Iterator[tuple[int, list[dict[str, Any]]]] = iter(())
        self._rows: tuple[int, list[dict[str, Any]]] = (0, [])

    def __call__(self, source: str) -> dict[str, Any]:
        path, _, number = source.rpartition("#")
        wanted = int(number)
        if path != self._path or wanted < self._rows[0]:
            self._path, self._batches, self._rows = path, self._read(path), (0, [])
        while wanted >= self._rows[0] + len(self._rows[1]):
            try:
                following = next(self._batches, None)
            except ConfigError as error:
                self._notes.add("file", "whose columns cannot be read, left out", str(error))
                following = None
            if following is None:
                return {}
            self._rows = following
        return self._rows[1][wanted - self._rows[0]]

    def _read(self, path: str) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        with open_parquet(self._root, path) as parquet:
            schema = parquet.schema_arrow
            column = image_column(path, schema, self._image)
            known = [name for name in column_names(schema) if name != self._key]
            names = [name for name in known if not is_bytes(schema.field(name).type)]
            kind = schema.field(column).type
            with_path = hasattr(kind, "get_field_index") and kind.get_field_index("path") >= 0
            begin = end = 0
            for group in range(parquet.metadata.num_row_groups):
                end += parquet.metadata.row_group(group).num_rows
                for found in self._group(parquet, path, group, begin, names, column if with_path else None):
                    yield begin, found
                    begin += len(found)
                if begin < end:
                    yield begin, [{} for _ in range(begin, end)]
                begin = end

    def _group(
        self, parquet: Any, path: str, group: int, begin: int, names: Sequence[str], image: str | None
    ) -> Iterator[list[dict[str, Any]]]:
        """Yields the rows of a group, a batch at a time; they end where it cannot be read. `image` has a path to be read."""
        wanted = [*names, f"{image}.path"] if image else names
        try:
            for batch in _batches(parquet, wanted, _COLUMN_ROWS, [group]) if wanted else ():
                columns = {name: self._values(batch, name, path, begin) for name in names}
                if image:
                    found = self._values(batch, image, path, begin)
                    columns[f"{image}_path"] = [value and value["path"] for value in found]
                yield [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
                begin += batch.num_rows
        except unreadable() as error:
            self._notes.add("group of rows", "whose columns cannot be read, left out", f"{path}#{begin} ({error})")

    def _values(self, batch: Any, name: str, path: str, begin: int) -> list[Any]:
        def lost(place: int) -> None:
            self._notes.add("value", "that cannot be held, left out", f"{path}#{begin + place} ({name})")

        return plain_values(batch.column(batch.schema.get_field_index(name)), lost)


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
        with self._lock:
            try:
                if number not in self._passed and (self._reader is None or number < self._at):
                    self._reader = self._forward(number)
                while number not in self._passed:
                    if self._reader is None or next(self._reader, self) is self:
                        self._reader = None
                        raise SourceError(f"{self._path}#{number} is gone: the file has fewer rows now")
            except (*unreadable(), ConfigError) as error:
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
                        self._take(batch.column(batch.schema.get_field_index(column)), first)
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
    import pyarrow.parquet as pq

    try:
        stream = open_file(root, path)
    except SourceError as error:
        raise ConfigError(str(error)) from error
    try:
        try:
            parquet = pq.ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False)
            _ = parquet.schema_arrow
        except unreadable() as error:
            raise no_parquet(path, error) from error
        yield parquet
    finally:
        with suppress(OSError):
            stream.close()


def unreadable() -> tuple[type[Exception], ...]:
    """Returns the errors of a file that is no Parquet, is damaged, or has what Arrow does not read."""
    import pyarrow as pa

    return (pa.ArrowException, OSError, ValueError, TypeError, LookupError, MemoryError)


def no_parquet(path: str, error: Exception) -> ConfigError:
    """Returns the error of a file that is no Parquet, or damaged."""
    return ConfigError(f"{path} cannot be read as Parquet: {error}; mend the file or move it away")


def _keys(parquet: Any, key: str, path: str) -> list[Any]:
    try:
        batches = _batches(parquet, [key], _COLUMN_ROWS)
        columns = [batch.column(batch.schema.get_field_index(key)) for batch in batches]
    except unreadable() as error:
        raise no_parquet(path, error) from error
    return [value for column in columns for value in plain_values(column, lambda place: None)]
