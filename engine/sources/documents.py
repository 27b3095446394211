"""Documents of a text corpus: a `.txt` file is one, and so is each row of a JSONL or Parquet file.

A row is named `docs.jsonl#17`, counted from 0; in JSONL a row is a line, so that a broken one keeps its number.
"""

import bisect
import os
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any, Protocol

from engine.pipeline.config import CorpusConfig
from engine.sources.listing import File, Notes, open_file, read_file, suffix
from engine.sources.values import decoded, parsed, plain
from manifests.errors import ConfigError, SourceError

LINES = (".jsonl", ".ndjson", ".json-lines")


class Rows(Protocol):
    """The rows of one open file."""

    def row(self, number: int) -> dict[str, Any]:
        """The fields of a row. Raises SourceError where it is no row of fields."""
        ...

    def close(self) -> None: ...


def open_rows(root: str, path: str) -> Rows:
    """The rows of a file below a source's root; to be closed. Raises SourceError where it cannot be opened."""
    stream = open_file(root, path)
    return _Lines(root, path, stream) if suffix(path) in LINES else _ParquetRows(path, stream)


def fields_of(line: bytes, source: str) -> dict[str, Any]:
    """The fields of a line of JSONL, called `source` in messages. Raises SourceError where it is no JSON object."""
    try:
        fields = parsed(line)
    except ValueError as error:
        raise SourceError(f"{source} is no JSON: {error}; mend the line") from error
    if not isinstance(fields, dict):
        raise SourceError(f"{source} is a JSON {type(fields).__name__}, expected an object")
    return fields


class _Lines:
    """Rows of a JSONL file, found by the offsets of its lines."""

    def __init__(self, root: str, path: str, stream: IO[bytes]) -> None:
        self._path = path
        self._stream = stream
        self._offsets = _line_offsets(root, path, _identity(stream))

    def close(self) -> None:
        self._stream.close()

    def row(self, number: int) -> dict[str, Any]:
        source = f"{self._path}#{number}"
        if number + 1 >= len(self._offsets):
            raise SourceError(f"{source} is gone: the file has {len(self._offsets) - 1} lines now")
        self._stream.seek(self._offsets[number])
        return fields_of(self._stream.read(self._offsets[number + 1] - self._offsets[number]), source)


# A worker reads a few thousand lines of the file at a time, for every part again.
@lru_cache(maxsize=16)
def _line_offsets(root: str, path: str, identity: tuple[int, int]) -> array:
    """Where each line of a file begins, and where the last one ends; `identity` changes where the file does."""
    offsets = array("Q", [0])
    with open_file(root, path) as stream:
        for line in stream:
            offsets.append(offsets[-1] + len(line))
    return offsets


def _identity(stream: IO[bytes]) -> tuple[int, int]:
    """Size and time of change (ns; 0 where the store is not local) of an open file."""
    try:
        status = os.fstat(stream.fileno())
    except (AttributeError, OSError):
        return stream.seek(0, os.SEEK_END), 0
    return status.st_size, status.st_mtime_ns


class _ParquetRows:
    """Rows of a Parquet file; the row group in use stays in memory."""

    def __init__(self, path: str, stream: IO[bytes]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._path = path
        try:
            self._file = pq.ParquetFile(stream)
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{path} is no valid Parquet file: {error}") from error
        metadata = self._file.metadata
        self._ends = [0]
        for group in range(metadata.num_row_groups):
            self._ends.append(self._ends[-1] + metadata.row_group(group).num_rows)
        self._group: tuple[int, Any] | None = None

    def close(self) -> None:
        self._file.close()

    def row(self, number: int) -> dict[str, Any]:
        import pyarrow as pa

        if number >= self._ends[-1]:
            raise SourceError(f"{self._path}#{number} is gone: the file has {self._ends[-1]} rows now")
        group = bisect.bisect_right(self._ends, number) - 1
        try:
            if self._group is None or self._group[0] != group:
                self._group = (group, self._file.read_row_group(group, use_threads=False))
            fields: Mapping[str, Any] = self._group[1].slice(number - self._ends[group], 1).to_pylist()[0]
        except (pa.ArrowException, OSError, ValueError) as error:
            raise SourceError(f"{self._path}#{number} cannot be read: {error}") from error
        return plain(fields)


SUFFIXES = (".txt", *LINES, ".parquet")
_ROW = re.compile(r"(.+\.(?:jsonl|ndjson|json-lines|parquet))#([0-9]+)", re.IGNORECASE | re.DOTALL)
_SCAN_ROWS = 4096
_READ_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document as a scan sees it. `key` is its key field's value, None where it has none; `text_bytes` in UTF-8."""

    source: str
    file: File
    key: str | None
    text_bytes: int


def scan_documents(root: str, files: Sequence[File], config: CorpusConfig, notes: Notes) -> Iterator[Document]:
    """All documents of the files, in the files' order, a file's by row.

    A line that is no JSON object is a document too: one that cannot be read. Raises ConfigError where no row has the text
    field, or a row lacks the key field.
    """
    sizes = _text_file_sizes(root, [file for file in files if suffix(file.path) == ".txt"], notes)
    rows = with_text = 0
    fields: dict[str, None] = {}
    for file in files:
        if file.path in sizes:
            yield Document(source=file.path, file=file, key=None, text_bytes=sizes[file.path])
            continue
        scan_rows = _scan_lines if suffix(file.path) in LINES else _scan_parquet
        for document, names in scan_rows(root, file, config):
            rows += 1
            with_text += config.text in names
            if not with_text:
                fields.update(dict.fromkeys(names))
            yield document
    if rows and not with_text and fields:
        raise ConfigError(
            f"none of {rows} rows has the field {config.text!r} (`text`) that holds the document; "
            f"they have {', '.join(fields)}"
        )


class DocumentColumns:
    """The other fields of documents; quick where they are asked for in their order, as the last file stays open."""

    def __init__(self, root: str, config: CorpusConfig) -> None:
        self._root = root
        self._config = config
        self._open: tuple[str, Rows] | None = None

    def __call__(self, source: str) -> dict[str, Any]:
        match = _ROW.fullmatch(source)
        if match is None:
            return {}
        try:
            if self._open is None or self._open[0] != match[1]:
                if self._open is not None:
                    self._open[1].close()
                self._open = (match[1], open_rows(self._root, match[1]))
            fields = self._open[1].row(int(match[2]))
        except SourceError:
            # The document cannot be read either; that is where the failure is recorded.
            return {}
        return {name: value for name, value in fields.items() if name not in (self._config.text, self._config.key)}


def read_documents(root: str, sources: Sequence[str], config: CorpusConfig) -> list[dict[str, Any] | SourceError]:
    """The fields of each document, its text under the corpus's text field; a SourceError where it cannot be read.

    Each file is opened once.
    """
    found: dict[int, dict[str, Any] | SourceError] = {}
    by_file: dict[str, list[tuple[int, int]]] = {}
    for index, source in enumerate(sources):
        match = _ROW.fullmatch(source)
        if match is None:
            found[index] = _text_file(root, source, config.text)
        else:
            by_file.setdefault(match[1], []).append((int(match[2]), index))
    for path, wanted in by_file.items():
        try:
            rows = open_rows(root, path)
        except SourceError as error:
            found.update((index, error) for _, index in wanted)
            continue
        with closing(rows):
            for number, index in sorted(wanted):
                found[index] = _row_document(rows, number, sources[index], config.text)
    return [found[index] for index in range(len(sources))]


def _text_file(root: str, path: str, field: str) -> dict[str, Any] | SourceError:
    try:
        return {field: decoded(read_file(root, path))[0]}
    except SourceError as error:
        return error


def _row_document(rows: Rows, number: int, source: str, field: str) -> dict[str, Any] | SourceError:
    try:
        fields = rows.row(number)
    except SourceError as error:
        return error
    if not isinstance(fields.get(field), str):
        return SourceError(
            f"{source} has no text in the field {field!r}: found {type(fields.get(field)).__name__}, "
            f"fields {', '.join(fields) or 'none'}"
        )
    return fields


def _text_file_sizes(root: str, files: Sequence[File], notes: Notes) -> dict[str, int]:
    """The bytes of each document in UTF-8, by path; a note for those that are in another encoding."""

    def measure(file: File) -> tuple[int, bool]:
        try:
            text, exact = decoded(read_file(root, file.path))
        except SourceError:
            return file.size_bytes, True
        return len(text.encode()), exact

    sizes = {}
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for file, (size, exact) in zip(files, pool.map(measure, files), strict=True):
            sizes[file.path] = size
            if not exact:
                notes.add("document", "not in UTF-8, read with replacement characters", file.path)
    return sizes


def _scan_lines(root: str, file: File, config: CorpusConfig) -> Iterator[tuple[Document, Sequence[str]]]:
    with _opened(root, file.path) as stream:
        for number, line in enumerate(stream):
            if not line.strip():
                continue
            source = f"{file.path}#{number}"
            try:
                fields = fields_of(line, source)
            except SourceError:
                yield Document(source=source, file=file, key=None, text_bytes=len(line.rstrip(b"\r\n"))), ()
                continue
            text = fields.get(config.text)
            key = None if config.key is None else _key(fields.get(config.key), config.key, source)
            size = len(text.encode()) if isinstance(text, str) else 0
            yield Document(source=source, file=file, key=key, text_bytes=size), tuple(fields)


def _scan_parquet(root: str, file: File, config: CorpusConfig) -> Iterator[tuple[Document, Sequence[str]]]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    wanted = [config.text] if config.key is None else [config.text, config.key]
    number = 0
    try:
        with _opened(root, file.path) as stream:
            parquet = pq.ParquetFile(stream)
            _check_columns(file.path, parquet.schema_arrow, config)
            names = parquet.schema_arrow.names
            for batch in parquet.iter_batches(_SCAN_ROWS, columns=wanted, use_threads=False):
                texts = batch[config.text].cast(pa.large_string())
                sizes = pc.call_function("binary_length", [texts]).to_pylist()
                keys = batch[config.key].to_pylist() if config.key else [None] * len(sizes)
                for size, value in zip(sizes, keys, strict=True):
                    source = f"{file.path}#{number}"
                    key = _key(value, config.key, source) if config.key else None
                    yield Document(source=source, file=file, key=key, text_bytes=size or 0), names
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{file.path} cannot be read as Parquet: {error}; mend the file or move it away") from error


def _check_columns(path: str, schema: Any, config: CorpusConfig) -> None:
    import pyarrow.types as types

    for option, name in (("text", config.text), ("key", config.key)):
        if name is not None and name not in schema.names:
            raise ConfigError(f"{path} has no column {name!r} (`{option}`); it has {', '.join(schema.names)}")
    kind = schema.field(config.text).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise ConfigError(f"{path}: the column {config.text!r} (`text`) is {kind}, expected strings")


def _opened(root: str, path: str) -> IO[bytes]:
    try:
        return open_file(root, path)
    except SourceError as error:
        raise ConfigError(str(error)) from error


def _key(value: Any, field: str, source: str) -> str:
    text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if not plain(text).strip():
        raise ConfigError(
            f"{source}: the key field {field!r} is {value!r}, expected text or an integer that is not empty"
        )
    return plain(text)
