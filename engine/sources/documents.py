"""Lists and reads the documents of a text corpus: a `.txt` file is one, and so is each row of a JSONL or Parquet file.

A row is named `docs.jsonl#17`, counted from 0; in JSONL a row is a line, so that a broken one keeps its number.
"""

import bisect
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache
from typing import IO, Any

from engine.pipeline.sections import CorpusConfig
from engine.sources.listing import (
    File,
    Listed,
    Listing,
    Notes,
    Scanned,
    key_of,
    open_file,
    read_file,
    row_of,
    suffix,
)
from engine.sources.parquet import open_parquet
from engine.sources.read import SourceReader
from engine.sources.values import decoded, key_text, parsed, plain
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


_ROWS = (*LINES, ".parquet")
SUFFIXES = (".txt", *_ROWS)
_SCAN_ROWS = 4096
_READ_THREADS = 16


def scan_documents(config: CorpusConfig, listed: Listing, notes: Notes) -> Scanned:
    """Lists all documents of a source, in the order of its files, a file's by row.

    A line that is no JSON object is a document too: one that cannot be read. Raises ConfigError if there is no document, no
    row has the text field, or a row has no key.
    """
    files = listed.with_suffix(config.source, SUFFIXES, "documents")
    for file in listed.others(files):
        notes.pass_over(file)
    sizes = _text_file_sizes(listed.root, [file for file in files if suffix(file.path) == ".txt"], notes)
    samples: list[Listed] = []
    with_text = 0
    fields: dict[str, None] = {}
    for file in files:
        if file.path in sizes:
            samples.append(_document(file, file.path, sizes[file.path]))
            continue
        scan_rows = _scan_lines if suffix(file.path) in LINES else _scan_parquet
        for document, names in scan_rows(listed.root, file, config):
            samples.append(document)
            with_text += config.text in names
            if not with_text:
                fields.update(dict.fromkeys(names))
    rows = len(samples) - len(sizes)
    if rows and not with_text and fields:
        raise ConfigError(
            f"none of {rows} rows has the field {config.text!r} (`text`) that holds the document; "
            f"they have {', '.join(fields)}"
        )
    if not samples:
        raise ConfigError(
            f"source {without_credentials(config.source)} holds no documents: its {len(files)} files have no rows"
        )
    return samples, DocumentColumns(listed.root, config)


def _document(file: File, source: str, text_bytes: int, key: str | None = None) -> Listed:
    return Listed(key=key or key_of(source), source=source, size_bytes=text_bytes, mtime_ns=file.mtime_ns)


def _key(config: CorpusConfig, source: str, fields: Mapping[str, Any]) -> str | None:
    """Returns the key that a row has of its own, None if the corpus names no field of keys."""
    if config.key is None:
        return None
    return key_text(fields.get(config.key), f"{source}: the key field {config.key!r}")


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
            return {self._text: decoded(read_file(self._root, source))[0]}
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


def _text_file_sizes(root: str, files: Sequence[File], notes: Notes) -> dict[str, int]:
    """Returns the bytes of each document in UTF-8, by path; adds a note of those that are in another encoding."""

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


def _scan_lines(root: str, file: File, config: CorpusConfig) -> Iterator[tuple[Listed, Sequence[str]]]:
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
            yield _document(file, source, size, _key(config, source, fields)), tuple(fields)


def _scan_parquet(root: str, file: File, config: CorpusConfig) -> Iterator[tuple[Listed, Sequence[str]]]:
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
                rows = batch.select(wanted[1:]).to_pylist()
                for size, fields in zip(sizes, rows, strict=True):
                    source = f"{file.path}#{number}"
                    yield _document(file, source, size or 0, _key(config, source, fields)), names
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
