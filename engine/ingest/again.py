"""Reads sources once more that an ingest could not read: their rows get bytes, in a newer samples file of the same part.

Only corpora that are packed need it, lists of URLs among them: others read their sources whenever they work on them.
"""

from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

import pyarrow as pa

from engine.ingest.filters import Filter
from engine.ingest.intake import Intake, Taken
from engine.ingest.part import put_part
from engine.pipeline.sections import CorpusConfig
from engine.sources.scan import Scan
from manifests.catalog.catalog import Catalog
from manifests.formats import sidecars
from manifests.formats.rewrite import read_table
from manifests.formats.shards import PLACE_COLUMNS, RESERVED_COLUMNS, write_samples
from manifests.log.actions import CorpusAdded, PartAdded
from manifests.queries import retention
from manifests.store.storage import read_same


def read_again(
    catalog: Catalog, added: CorpusAdded, scan: Scan, section: CorpusConfig, classes: Collection[str], *, run: str
) -> tuple[int, int]:
    """Reads the sources that could not be read for an error of these classes (none: any), and commits their parts.

    Returns how many were tried, and how many have bytes now. What was forgotten, or the corpus's filter leaves out, stays
    as it is.
    """
    here = {listed.key: listed for listed in scan.samples}
    forgotten, judge = retention.forgotten_bytes(catalog), Filter(section.filter, catalog, added.corpus)
    tried = read = 0
    for part, rows in _without_bytes(catalog, added.corpus, classes).items():
        wanted = {row: here[key] for row, key in rows.items() if key in here}
        if not wanted:
            continue
        tried += len(wanted)
        with closing(Intake(scan, section, forgotten, judge)) as intake:
            found = {
                row: taken
                for row, taken in zip(wanted, intake.read(list(wanted.values()), 0), strict=True)
                if taken.number is not None
                and taken.sha256.hex() not in forgotten
                and judge.judge(taken.sha256, taken.size) is None
            }
            if found:
                catalog.commit([_write_again(catalog, added, part, intake, found)], run=run)
        read += len(found)
    return tried, read


def count_without_bytes(catalog: Catalog, corpus: str) -> int:
    """Returns how many rows of a corpus have no bytes, as their sources could not be read."""
    return sum(len(rows) for rows in _without_bytes(catalog, corpus, ()).values())


def _without_bytes(catalog: Catalog, corpus: str, classes: Collection[str]) -> dict[int, dict[int, str]]:
    """Returns the keys of the rows without bytes, by part and row."""
    if "source_error" not in catalog.sql("SELECT * FROM samples LIMIT 0").column_names:
        return {}
    rows = catalog.sql(
        'SELECT part, "row", key, source_error FROM samples WHERE corpus = ? AND source_error IS NOT NULL ORDER BY 1, 2',
        [corpus],
    )
    found: dict[int, dict[int, str]] = {}
    for row in rows.to_pylist():
        if not classes or row["source_error"].partition(":")[0] in classes:
            found.setdefault(row["part"], {})[row["row"]] = row["key"]
    return found


def _write_again(
    catalog: Catalog, added: CorpusAdded, number: int, intake: Intake, found: Mapping[int, Taken]
) -> PartAdded:
    """Writes the samples file of a part with the bytes of some rows, and the tar of all that are packed."""
    storage, packing = catalog.storage, intake.packing
    assert packing is not None
    part = next(part for part in catalog.parts(added.corpus) if part.part == number)
    table = read_table(read_same(storage, part.path, part.sha256))
    rows: list[dict[str, Any]] = [{**dict.fromkeys(PLACE_COLUMNS), **row} for row in table.to_pylist()]
    numbers = {row: taken.number for row, taken in found.items() if taken.number is not None}
    for place, row in enumerate(rows):
        if row["source_pack"] is not None:
            numbers[place] = part.rows + place
            data = storage.read_range(row["source_pack"], row["source_offset"], row["size_bytes"])
            packing.put(numbers[place], data)
    path, sha256, offsets = packing.write(storage, added.corpus, number, dict(sorted(numbers.items())))
    for place, taken in found.items():
        rows[place].update(size_bytes=taken.size_bytes, sha256=taken.sha256, source_error=None)
    for place, offset in offsets.items():
        rows[place].update(source_pack=path, source_offset=offset)
    places = [(name, kind) for name, kind in PLACE_COLUMNS.items() if any(row[name] is not None for row in rows)]
    columns = [item for item in table.schema if item.name not in RESERVED_COLUMNS]
    data = write_samples(rows, pa.schema([*places, *columns]))
    made = replace(
        put_part(storage, added.corpus, number, [row["key"] for row in rows], data),
        source_bytes=sum(row["size_bytes"] or 0 for row in rows),
        key_min=part.key_min,
        key_max=part.key_max,
        pack_path=path,
        pack_sha256=sha256,
    )
    earlier = [each for each in retention.forgotten(catalog) if (each.corpus, each.part) == (added.corpus, number)]
    storage.put(sidecars.path_of(made), sidecars.of_part(made, added, earlier))
    return made
