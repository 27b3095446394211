"""Reads lists of URLs: a text file with one a line, or a table (CSV, TSV, Parquet, JSONL) with a column of them."""

from collections.abc import Sequence
from typing import Any

from engine.pipeline.sections import CorpusConfig
from engine.sources.columns import TABLE_SUFFIXES, Table, read_table
from engine.sources.listing import NO_KEY, File, Listed, Notes, Scanned, check_keys, key_of, read_file, suffix, uri
from engine.sources.values import decoded, key_text
from manifests.errors import ConfigError, SourceError, nearest

SUFFIXES = (".txt", *TABLE_SUFFIXES)


def scan_urls(root: str, files: Sequence[File], config: CorpusConfig, notes: Notes) -> Scanned:
    """Lists a sample a URL, in the order of the files and rows; its source columns are the row's other fields.

    A URL that stands twice is one sample. A list that cannot be read, or has no such columns, is passed over; raises
    ConfigError if there is no other.
    """
    column = config.url or ""
    samples: list[Listed] = []
    places: dict[str, tuple[Table, int]] = {}
    problems: list[tuple[File, ConfigError]] = []
    for file in files:
        try:
            table = _table(root, file, config, notes)
        except ConfigError as error:
            problems.append((file, error))
            continue
        for number, value in enumerate(table.columns[column]):
            url = value.strip() if isinstance(value, str) else ""
            if not url:
                notes.add("row", f"of {file.path} without a URL, passed over", str(number))
            elif url in places:
                notes.add("URL", "that stands twice, taken once", url)
            else:
                value = None if config.key is None else table.columns[config.key][number]
                key = key_of(url) if config.key is None else key_text(value)
                if key is None:
                    notes.add(*NO_KEY, f"{file.path}, row {number}: the key is {value!r:.100}")
                    continue
                places[url] = table, number
                samples.append(Listed(key=key.strip(), source=url, size_bytes=None, mtime_ns=None))
    check_keys(samples, notes)
    if not samples:
        raise problems[0][1] if problems else ConfigError(f"the {len(files)} lists hold no URLs")
    for file, error in problems:
        notes.leave_out(file, "list", error)

    def read(url: str) -> dict[str, Any]:
        table, number = places[url]
        return {name: value for name, value in table.row(number, column).items() if name != config.key}

    return samples, read


def _table(root: str, file: File, config: CorpusConfig, notes: Notes) -> Table:
    """Reads a list. Raises ConfigError if it cannot be read, or has no column of URLs or of keys."""
    column = config.url or ""
    if suffix(file.path) == ".txt":
        table = _lines(root, file, column)
    else:
        table = read_table(uri(root, file.path), config.key, notes)
    for option, name in (("url", column), ("key", config.key)):
        if name is not None and name not in table.columns:
            raise ConfigError(f"{file.path} has no column {name!r} (`{option}`); {nearest(name, table.columns)}")
    return table


def _lines(root: str, file: File, column: str) -> Table:
    try:
        text, _ = decoded(read_file(root, file.path))
    except SourceError as error:
        raise ConfigError(str(error)) from error
    lines = [line.strip() for line in text.splitlines()]
    urls = [line for line in lines if line and not line.startswith("#")]
    return Table(name=file.path, rows=len(urls), columns={column: urls})
