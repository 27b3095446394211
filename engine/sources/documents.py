"""Lists and reads the documents of a text corpus: a `.txt` file is one, and so is each row of a JSONL or Parquet file.

A row is named `docs.jsonl#17`, counted from 0; in JSONL a row is a line, so that a broken one keeps its number.
"""

import bisect
import os
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache
from typing import IO, Any

from engine.pipeline.sections import CorpusConfig
from engine.sources.listing import (
    NO_KEY,
    File,
    Listed,
    Listing,
    Notes,
    Scanned,
    check_keys,
    key_of,
    open_file,
    read_file,
    row_of,
    suffix,
)
from engine.sources.parquet import no_parquet, open_parquet, unreadable
from engine.sources.read import SourceReader
from engine.sources.values import column_names, decoded, key_text, parsed, plain_values
from manifests.errors import ConfigError, SourceError
from manifests.formats.shards import SourcePlace
from manifests.store.uris import without_credentials

LINES = (".jsonl", ".ndjson", ".json-lines")


def fields_of(line: bytes, source: str) -> dict[str, Any]:
    """Returns the fields of a line of JSONL, called `source` in messages. Raises SourceError if it is not a JSON object."""
    try:
        fields = parsed(line)
    except ValueError as error:
        raise SourceError(f"{source} is no JSON: {error}; mend the line") from error
    if not isinstance(fields, dict):
        raise SourceError(f"{source} is a JSON {type(fields).__name__}, expected an object")
    return fields


class _Lines:
    """Reads rows of a JSONL file, found by the offsets of its lines."""

    def __init__(self, root: str, path: str) -> None:
        self._path = path
        self._stream = open_file(root, path)
        self._offsets = _line_offsets(root, path, _identity(self._stream))

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
    """Returns where each line of a file begins, and where the last one ends; `identity` changes if the file does."""
    offsets = array("Q", [0])
    with open_file(root, path) as stream:
        for line in stream:
            offsets.append(offsets[-1] + len(line))
    return offsets


def _identity(stream: IO[bytes]) -> tuple[int, int]:
    """Returns the size and time of change (ns; 0 if the store is not local) of an open file."""
    try:
        status = os.fstat(stream.fileno())
    except (AttributeError, OSError):
        return stream.seek(0, os.SEEK_END), 0
    return status.st_size, status.st_mtime_ns


class _ParquetRows:
    """Reads rows of a Parquet file; the row group in use stays in memory."""

    def __init__(self, root: str, path: str) -> None:
        self._path = path
        self._opened = ExitStack()
        try:
            self._file = self._opened.enter_context(open_parquet(root, path))
        except ConfigError as error:
            raise SourceError(str(error)) from error
        metadata = self._file.metadata
        self._ends = [0]
        for group in range(metadata.num_row_groups):
            self._ends.append(self._ends[-1] + metadata.row_group(group).num_rows)
        self._group: tuple[int, Any] | None = None

    def close(self) -> None:
        self._opened.close()

    def row(self, number: int) -> dict[str, Any]:
        if number >= self._ends[-1]:
            raise SourceError(f"{self._path}#{number} is gone: the file has {self._ends[-1]} rows now")
        group = bisect.bisect_right(self._ends, number) - 1
        try:
            if self._group is None or self._group[0] != group:
                names = column_names(self._file.schema_arrow)
                self._group = (group, self._file.read_row_group(group, names, use_threads=False).select(names))
        except unreadable() as error:
            raise SourceError(f"{self._path}#{number} cannot be read: {error}") from error
        row = self._group[1].slice(number - self._ends[group], 1)
        return {name: plain_values(row[name], lambda place: None)[0] for name in row.column_names}


_ROWS = (*LINES, ".parquet")
SUFFIXES = (".txt", *_ROWS)
_SCAN_ROWS = 4096
_READ_THREADS = 16


def scan_documents(config: CorpusConfig, listed: Listing, notes: Notes) -> Scanned:
    """Lists all documents of a source, in the order of its files, a file's by row.

    A line that is no JSON object is a document too: one that cannot be read. A file that cannot be read is passed over, and
    so is a row without a key. Raises ConfigError if there is no document, or no row has the text field.
    """
    files = listed.with_suffix(config.source, SUFFIXES, "documents")
    for file in listed.others(files):
        notes.pass_over(file)
    texts = [file for file in files if suffix(file.path) == ".txt"]
    sizes = _text_file_sizes(listed.root, texts, config.most_bytes, notes)
    samples: list[Listed] = []
    with_text = 0
    fields: dict[str, None] = {}
    problems: list[tuple[File, ConfigError]] = []
    for file in files:
        if file.path in sizes:
            samples.append(_document(file, file.path, sizes[file.path]))
            continue
        scan_rows = _scan_lines if suffix(file.path) in LINES else _scan_parquet
        try:
            found = list(scan_rows(listed.root, file, config, notes))
        except ConfigError as error:
            problems.append((file, error))
            continue
        for document, names in found:
            samples.append(document)
            with_text += config.text in names
            if not with_text:
                fields.update(dict.fromkeys(names))
    check_keys(samples, notes)
    rows = len(samples) - len(sizes)
    if rows and not with_text and fields:
        raise ConfigError(
            f"none of {rows} rows has the field {config.text!r} (`text`) that holds the document; "
            f"they have {', '.join(fields)}"
        )
    if problems and not samples:
        raise problems[0][1]
    if not samples:
        raise ConfigError(
            f"source {without_credentials(config.source)} holds no documents: its {len(files)} files have no rows"
        )
    for file, error in problems:
        notes.leave_out(file, "file", error)
    return samples, DocumentColumns(listed.root, config)


def _document(file: File, source: str, text_bytes: int, key: str | None = None) -> Listed:
    return Listed(key=key or key_of(source), source=source, size_bytes=text_bytes, mtime_ns=file.mtime_ns)


def _keyed(
    file: File, source: str, text_bytes: int, config: CorpusConfig, value: Any, notes: Notes
) -> Iterator[Listed]:
    """Yields the document in a row; none if the corpus names a field of keys, and its `value` is no key."""
    key = None if config.key is None else key_text(value)
    if key is None and config.key is not None:
        notes.add(*NO_KEY, f"{source}: the key field {config.key!r} is {value!r:.100}")
    else:
        yield _document(file, source, text_bytes, key)


class DocumentColumns:
    """Reads the other fields of documents by source."""

    def __init__(self, root: str, config: CorpusConfig) -> None:
        self._rows = _OpenRows(root)
        self._left_out = (config.text, config.key)

    def __call__(self, source: str) -> dict[str, Any]:
        found = row_of(source, _ROWS)
        if found is None:
            return {}
        try:
            fields = self._rows.row(*found)
        except SourceError:
            # The document cannot be read either; that is where the failure is recorded.
            return {}
        return {name: value for name, value in fields.items() if name not in self._left_out}


class DocumentReader(SourceReader):
    """Reads the documents of some rows of a samples file; one file is open at a time, so one thread may read."""

    def __init__(
        self,
        root: str,
        config: CorpusConfig,
        rows: Sequence[SourcePlace],
        storage: object = None,
        *,
        beside: object = (),
    ) -> None:
        """Takes `storage` and `beside` as every reader does: documents are not packed, and nothing lies beside them."""
        self._root = root
        self._text = config.text
        self._most = config.most_bytes
        self._sources = [row.source or "" for row in rows]
        self._rows = _OpenRows(root)

    def read(self, place: int) -> bytes:
        """Returns the text of a document in UTF-8. Raises SourceError if it cannot be read."""
        return self.fields(place)[self._text].encode()

    def fields(self, place: int) -> dict[str, Any]:
        """Returns the fields of a document, its text under the corpus's text field. Raises SourceError as `read`."""
        source = self._sources[place]
        found = row_of(source, _ROWS)
        if found is None:
            return {self._text: decoded(read_file(self._root, source, most=self._most))[0]}
        fields = self._rows.row(*found)
        if not isinstance(fields.get(self._text), str):
            raise SourceError(
                f"{source} has no text in the field {self._text!r}: found {type(fields.get(self._text)).__name__}, "
                f"fields {', '.join(fields) or 'none'}"
            )
        return fields

    def close(self) -> None:
        """Closes the file that is open."""
        self._rows.close()


class _OpenRows:
    """Reads rows of files; quick in their order, as the last file stays open."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._open: tuple[str, _Lines | _ParquetRows] | None = None

    def row(self, path: str, number: int) -> dict[str, Any]:
        """Returns the fields of a row. Raises SourceError if it cannot be read."""
        if self._open is None or self._open[0] != path:
            self.close()
            self._open = (path, (_Lines if suffix(path) in LINES else _ParquetRows)(self._root, path))
        return self._open[1].row(number)

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None


def _text_file_sizes(root: str, files: Sequence[File], most: int, notes: Notes) -> dict[str, int]:
    """Returns the bytes of each document in UTF-8, by path; adds a note of those that are in another encoding."""

    def measure(file: File) -> tuple[int, bool]:
        try:
            text, exact = decoded(read_file(root, file.path, most=most))
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


def _scan_lines(root: str, file: File, config: CorpusConfig, notes: Notes) -> Iterator[tuple[Listed, Sequence[str]]]:
    try:
        stream = open_file(root, file.path)
    except SourceError as error:
        raise ConfigError(str(error)) from error
    with stream:
        for number, line in enumerate(stream):
            if not line.strip():
                continue
            source = f"{file.path}#{number}"
            try:
                fields = fields_of(line, source)
            except SourceError:
                yield _document(file, source, len(line.rstrip(b"\r\n"))), ()
                continue
            text = fields.get(config.text)
            size = len(text.encode()) if isinstance(text, str) else 0
            for document in _keyed(file, source, size, config, fields.get(config.key or ""), notes):
                yield document, tuple(fields)


def _scan_parquet(root: str, file: File, config: CorpusConfig, notes: Notes) -> Iterator[tuple[Listed, Sequence[str]]]:
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = [config.text] if config.key is None else [config.text, config.key]
    number = 0
    try:
        with open_parquet(root, file.path) as parquet:
            _check_columns(file.path, parquet.schema_arrow, config)
            names = parquet.schema_arrow.names
            for batch in parquet.iter_batches(_SCAN_ROWS, columns=wanted, use_threads=False):
                texts = batch[config.text].cast(pa.large_string())
                sizes = pc.call_function("binary_length", [texts]).to_pylist()
                keys = sizes if config.key is None else plain_values(batch[config.key], lambda place: None)
                for size, key in zip(sizes, keys, strict=True):
                    for document in _keyed(file, f"{file.path}#{number}", size or 0, config, key, notes):
                        yield document, names
                    number += 1
    except unreadable() as error:
        raise no_parquet(file.path, error) from error


def _check_columns(path: str, schema: Any, config: CorpusConfig) -> None:
    import pyarrow.types as types

    names = column_names(schema)
    for option, name in (("text", config.text), ("key", config.key)):
        if name is not None and name not in names:
            raise ConfigError(f"{path} has no column {name!r} (`{option}`); it has {', '.join(names)}")
    kind = schema.field(config.text).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise ConfigError(f"{path}: the column {config.text!r} (`text`) is {kind}, expected strings")
