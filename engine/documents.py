"""Documents of a text corpus: a `.txt` file is one, and so is each row of a JSONL or Parquet file.

A row is named `docs.jsonl#17`, counted from 0; in JSONL a row is a line, so that a broken one keeps its number.
"""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import IO, Any

from engine.config import CorpusConfig
from engine.document_rows import LINES, Rows, fields_of, open_rows
from engine.listing import File, Notes, open_file, read_file, suffix
from engine.values import decoded, plain
from manifests.errors import ConfigError, SourceError

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
