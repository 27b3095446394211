"""Asks the log, over all its versions, about rows that are to go and the files that hold them."""

import datetime
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from manifests.catalog.catalog import Catalog
from manifests.log.actions import CorpusAdded, Forgotten, PartAdded, SamplesDropped, ShardAdded
from manifests.modality import Form
from manifests.recipe import sha256_hex

# Sources that could not be read at ingest have it: it tells no two of them apart.
NO_BYTES = sha256_hex(b"")


@dataclass(frozen=True, kw_only=True)
class ForgottenRow:
    """Names a sample by its place; `sha256` is of its source bytes."""

    corpus: str
    part: int
    row: int
    key: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class DroppedRow:
    """Names a row of the view `dropped`; `sha256` is None if its bytes were never read."""

    corpus: str
    key: str
    source: str | None
    sha256: str | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    """Names a file that a forget put in place of another."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class RecipeShards:
    """Counts the live shards of a recipe in a corpus."""

    corpus: str
    modality: str
    form: Form
    fingerprint: str
    is_current: bool
    shards: int
    size_bytes: int


# -- rows -------------------------------------------------------------------------------------------------------------


def find_rows(catalog: Catalog, lines: Sequence[str]) -> dict[str, list[ForgottenRow]]:
    """Returns the samples that each line names: as corpus/key, by sha256 of the source bytes, by source, or by column `url`.

    Lines that name none are not in the answer.
    """
    known = {row["corpus"] for row in catalog.corpora()}
    split = [(line, *line.split("/", 1)) for line in lines if line.split("/", 1)[0] in known and "/" in line]
    columns = "s.corpus, s.part, s.row, s.key, s.sha256"
    queries = [
        (
            f"SELECT a.line, {columns} FROM samples s JOIN (SELECT unnest(?::VARCHAR[]) AS line, "
            "unnest(?::VARCHAR[]) AS corpus, unnest(?::VARCHAR[]) AS key) a ON a.corpus = s.corpus AND a.key = s.key",
            [[each[at] for each in split] for at in range(3)],
        )
    ]
    by_text = {"s.sha256": [line.lower() for line in lines], "s.source": list(lines)}
    if "url" in catalog.sql("SELECT * FROM samples LIMIT 0").column_names:
        by_text["s.url::VARCHAR"] = list(lines)
    for column, texts in by_text.items():
        asked = "SELECT unnest(?::VARCHAR[]) AS line, unnest(?::VARCHAR[]) AS text"
        query = f"SELECT a.line, {columns} FROM samples s JOIN ({asked}) a ON a.text = {column}"
        queries.append((query, [list(lines), texts]))
    found: dict[str, dict[ForgottenRow, None]] = {}
    for query, parameters in queries:
        for row in catalog.sql(f"{query} WHERE s.sha256 IS NOT NULL", parameters).to_pylist():
            found.setdefault(row.pop("line"), {})[ForgottenRow(**row)] = None
    return {line: list(rows) for line, rows in found.items()}


def rows_of_bytes(catalog: Catalog, sources_sha256: Collection[str]) -> list[ForgottenRow]:
    """Returns the samples whose source bytes have one of these sha256."""
    query = (
        "SELECT corpus, part, row, key, sha256 FROM samples WHERE sha256 IN (SELECT unnest(?::VARCHAR[])) "
        "ORDER BY corpus, part, row"
    )
    return [ForgottenRow(**row) for row in catalog.sql(query, [sorted(set(sources_sha256) - {NO_BYTES})]).to_pylist()]


def sources_of(catalog: Catalog, rows: Collection[ForgottenRow]) -> dict[tuple[str, str], str]:
    """Returns the source of each sample, by corpus and key."""
    query = (
        "SELECT corpus, key, source FROM samples SEMI JOIN (SELECT unnest(?::VARCHAR[]) AS corpus, "
        "unnest(?::VARCHAR[]) AS key) USING (corpus, key) WHERE source IS NOT NULL"
    )
    found = catalog.sql(query, [[row.corpus for row in rows], [row.key for row in rows]]).to_pylist()
    return {(row["corpus"], row["key"]): row["source"] for row in found}


def find_dropped(catalog: Catalog, lines: Sequence[str]) -> dict[str, list[DroppedRow]]:
    """Returns the rows of the view `dropped` that each line names: as corpus/key, by sha256 of the bytes, or by source."""
    by_text = {"d.corpus || '/' || d.key": list(lines), "d.sha256": [line.lower() for line in lines], "d.source": lines}
    found: dict[str, dict[DroppedRow, None]] = {}
    for column, texts in by_text.items():
        query = (
            "SELECT a.line, d.corpus, d.key, d.source, d.sha256, d.reason FROM dropped d "
            f"JOIN (SELECT unnest(?::VARCHAR[]) AS line, unnest(?::VARCHAR[]) AS text) a ON a.text = {column}"
        )
        for row in catalog.sql(query, [list(lines), list(texts)]).to_pylist():
            found.setdefault(row.pop("line"), {})[DroppedRow(**row)] = None
    return {line: list(rows) for line, rows in found.items()}


def dropped_of(catalog: Catalog, rows: Collection[ForgottenRow]) -> list[DroppedRow]:
    """Returns the rows of the view `dropped` that have the bytes or the key of one of these samples."""
    if not rows:
        return []
    query = (
        "SELECT corpus, key, source, sha256, reason FROM dropped WHERE sha256 IN (SELECT unnest($1::VARCHAR[])) "
        "OR (corpus, key) IN (SELECT (corpus, key) FROM (SELECT unnest($2::VARCHAR[]) AS corpus, "
        "unnest($3::VARCHAR[]) AS key)) ORDER BY corpus, key"
    )
    corpora, keys = [row.corpus for row in rows], [row.key for row in rows]
    found = catalog.sql(query, [sorted({row.sha256 for row in rows} - {NO_BYTES}), corpora, keys])
    return [DroppedRow(**row) for row in found.to_pylist()]


def forgotten(catalog: Catalog) -> list[Forgotten]:
    """Returns everything that was ever forgotten, in the order of the log."""
    return catalog.records(Forgotten, "SELECT * FROM log.forgotten ORDER BY version, corpus, part")


def every_forgotten_row(catalog: Catalog) -> list[ForgottenRow]:
    """Returns each row that was ever forgotten, in the order of the log."""
    return [
        ForgottenRow(corpus=action.corpus, part=action.part, row=row, key=key, sha256=sha256)
        for action in forgotten(catalog)
        for row, key, sha256 in zip(action.rows, action.keys, action.sources_sha256, strict=True)
    ]


def forgotten_rows(catalog: Catalog) -> dict[tuple[str, int], set[int]]:
    """Returns the rows that were forgotten, by corpus and part."""
    found: dict[tuple[str, int], set[int]] = {}
    for action in forgotten(catalog):
        found.setdefault((action.corpus, action.part), set()).update(action.rows)
    return found


def part_records(catalog: Catalog, corpus: str, part: int) -> tuple[CorpusAdded, PartAdded, list[ShardAdded]]:
    """Returns the records of a part as it is now: of its corpus, of itself, and of its live shards."""
    of_part = "SELECT * FROM state.part WHERE corpus = ? AND part = ?"
    return (
        catalog.records(CorpusAdded, "SELECT * FROM state.corpus WHERE corpus = ?", [corpus])[0],
        catalog.records(PartAdded, of_part, [corpus, part])[0],
        catalog.live_shards(corpus, part, part),
    )


def forgotten_bytes(catalog: Catalog) -> set[str]:
    """Returns the sha256 of all source bytes that were forgotten."""
    return set(catalog.sql("SELECT DISTINCT sha256 FROM forgotten")["sha256"].to_pylist()) - {NO_BYTES}


# -- files ------------------------------------------------------------------------------------------------------------


def files_of_part(catalog: Catalog, corpus: str, part: int) -> list[str]:
    """Returns every shard and samples file that any version of the log names for a part."""
    query = (
        "SELECT path FROM log.part WHERE corpus = $1 AND part = $2 "
        "UNION SELECT pack_path FROM log.part WHERE corpus = $1 AND part = $2 AND pack_path IS NOT NULL "
        "UNION SELECT path FROM log.shard WHERE corpus = $1 AND part = $2 ORDER BY path"
    )
    return catalog.sql(query, [corpus, part])["path"].to_pylist()


def lists_of(catalog: Catalog, corpora: Collection[str]) -> list[SamplesDropped]:
    """Returns the records of the lists of dropped samples of these corpora."""
    query = "SELECT * FROM state.samples_dropped WHERE corpus IN (SELECT unnest(?::VARCHAR[])) ORDER BY version, path"
    return catalog.records(SamplesDropped, query, [list(corpora)])


def replaced_lists(catalog: Catalog) -> set[str]:
    """Returns the paths of the lists of dropped samples that were written again without what was forgotten."""
    query = "SELECT path FROM log.samples_dropped ANTI JOIN state.samples_dropped USING (path)"
    return set(catalog.sql(query)["path"].to_pylist())


def rewritten(catalog: Catalog) -> dict[str, Rewritten]:
    """Returns what forgets put in place of the shards and samples files that were live then, by their paths."""
    same = "n.version = f.version AND n.corpus = o.corpus AND n.part = o.part"
    forgot = "JOIN log.forgotten f ON f.version = o.end_version AND f.corpus = o.corpus AND f.part = o.part"
    rows = catalog.sql(
        f"SELECT o.path AS old, n.path, lower(hex(n.sha256)) AS sha256, n.size_bytes FROM log.shard o {forgot} "
        f"JOIN log.shard n ON {same} AND n.modality = o.modality AND n.form = o.form AND n.fingerprint = o.fingerprint "
        "AND n.crop IS NOT DISTINCT FROM o.crop UNION ALL "
        f"SELECT o.path AS old, n.path, lower(hex(n.sha256)) AS sha256, n.size_bytes FROM log.part o {forgot} "
        f"JOIN log.part n ON {same} ORDER BY old"
    ).to_pylist()
    return {row.pop("old"): Rewritten(**row) for row in rows}


def sha256_of_shards(catalog: Catalog, paths: Collection[str]) -> list[str]:
    """Returns the sha256 of the shards that the log has under these paths."""
    query = "SELECT DISTINCT lower(hex(sha256)) AS sha256 FROM log.shard WHERE path IN (SELECT unnest(?::VARCHAR[]))"
    return catalog.sql(query, [list(paths)])["sha256"].to_pylist()


def version_before(catalog: Catalog, moment: datetime.datetime) -> int:
    """Returns the version that was the newest at a moment (UTC), 0 if the log began later.

    Where a clock jumped it is an earlier one rather than a later.
    """
    query = (
        "SELECT coalesce(min(version) FILTER (time > ?::TIMESTAMP) - 1, max(version), 0) AS version FROM log.applied"
    )
    return catalog.sql(query, [moment.astimezone(datetime.UTC).replace(tzinfo=None)])["version"][0].as_py()


# -- recipes ----------------------------------------------------------------------------------------------------------


def recipe_shards(catalog: Catalog) -> list[RecipeShards]:
    """Returns the recipes that have live shards, by corpus."""
    rows = catalog.sql(
        "SELECT s.corpus, s.modality, s.form, s.fingerprint, any_value(c.fingerprint) IS NOT NULL AS is_current, "
        "count(*) AS shards, sum(s.size_bytes)::BIGINT AS size_bytes FROM state.shard s LEFT JOIN state.current c "
        "USING (corpus, modality, form, fingerprint) GROUP BY ALL ORDER BY ALL"
    )
    return [RecipeShards(**row) for row in rows.to_pylist()]


# -- who saw them -----------------------------------------------------------------------------------------------------


def training_runs(catalog: Catalog) -> list[dict[str, Any]]:
    """Returns the runs that trained: run, started_at, and config as JSON text."""
    return catalog.sql("SELECT run, started_at, config FROM runs WHERE kind = 'train' ORDER BY started_at").to_pylist()


def tokenizers_since(catalog: Catalog, parts: Collection[tuple[str, int]]) -> list[dict[str, str]]:
    """Returns the tokenizers of these parts' corpora that were fitted after the first of them was there: name and digest."""
    rows = catalog.sql(
        "WITH place AS (SELECT unnest($1::VARCHAR[]) AS corpus, unnest($2::INTEGER[]) AS part), "
        "used AS (SELECT DISTINCT r.document ->> '$.parameters.tokenizer' AS name FROM log.current c "
        "JOIN state.recipe r USING (fingerprint) WHERE c.corpus IN (SELECT corpus FROM place)) "
        "SELECT name, digest FROM log.tokenizer SEMI JOIN used USING (name) WHERE rows > 0 AND version > "
        "(SELECT min(p.version) FROM log.part p SEMI JOIN place USING (corpus, part)) GROUP BY ALL ORDER BY ALL",
        [[corpus for corpus, _ in parts], [part for _, part in parts]],
    )
    return rows.to_pylist()
