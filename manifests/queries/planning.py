"""Asks the log about work that is to be done: missing shards, and shards that are not whole, a window of parts at a time,
so that a workspace of any size is never held at once.

A shard is whole if no row of it was left out by a selection (status 3).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from manifests.catalog.catalog import Catalog, as_action
from manifests.log.actions import PartAdded, ShardAdded
from manifests.modality import Form

# What tells the shards of a part apart: modality, form, fingerprint, crop.
Place = tuple[str, Form, str, int | None]
_WANTED = (
    "wanted AS (SELECT unnest(range(len(($2).modality))) AS place, unnest(($2).modality) AS modality, "
    "unnest(($2).form) AS form, unnest(($2).fingerprint) AS fingerprint, unnest(($2).crop)::INTEGER AS crop)"
)
_MATCHED = (
    "state.shard s JOIN wanted w ON w.modality = s.modality AND w.form = s.form AND w.fingerprint = s.fingerprint "
    "AND coalesce(w.crop, -1) = coalesce(s.crop, -1)"
)


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """Holds a part that misses something: the places (numbers into the list asked with) of the shards that are done."""

    part: PartAdded
    done: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Count:
    """Counts how far the parts of a corpus are with a form of a modality.

    done            parts whose shards are all there and whole
    partial         parts that have shards with rows that were not selected
    with_failures   parts that have shards with failed rows; `failed` counts those rows
    begun           parts that have some of the crops asked for, and not all
    stale           parts that have no shards of the recipe, and some of another one
    before          the fingerprint of the newest of those, None if none is stale
    """

    modality: str
    form: Form
    done: int = 0
    partial: int = 0
    with_failures: int = 0
    failed: int = 0
    begun: int = 0
    stale: int = 0
    before: str | None = None


def was_cut_short(catalog: Catalog) -> bool:
    """Tells whether a run before the newest, which is under way, did not come to its end, or left work items."""
    query = (
        "SELECT count(*) > 0 AS was FROM (SELECT * FROM runs ORDER BY started_at DESC OFFSET 1) "
        "WHERE status <> 'done' OR coalesce((counts ->> 'failed_items')::BIGINT, 0) > 0"
    )
    return _ask(catalog, query, [])[0]["was"]


def last_part(catalog: Catalog, corpus: str) -> int:
    """Returns the number of the corpus's last part, -1 if it has none."""
    return _ask(catalog, "SELECT coalesce(max(part), -1) AS last FROM state.part WHERE corpus = $1", [corpus])[0][
        "last"
    ]


def spread_parts(catalog: Catalog, corpus: str, most: int, *, among: Collection[int] | None = None) -> list[PartAdded]:
    """Returns up to `most` parts of a corpus, evenly spread; `among` are those that count, None: all."""
    return catalog.records(
        PartAdded,
        "SELECT * EXCLUDE (place, parts) FROM (SELECT *, row_number() OVER (ORDER BY part) - 1 AS place, count(*) OVER () AS "
        "parts FROM state.part WHERE corpus = $1 AND ($3::INTEGER[] IS NULL OR part IN (SELECT unnest($3::INTEGER[])))) "
        "WHERE place % greatest(1, parts // $2) = 0 ORDER BY part LIMIT $2",
        [corpus, most, None if among is None else list(among)],
    )


def unfinished(
    catalog: Catalog, corpus: str, places: Sequence[Place], first: int, last: int, *, and_failed: bool
) -> list[Unfinished]:
    """Returns the parts from `first` to `last` that miss a whole shard at one of the places, in their order.

    With `and_failed` a shard with failed rows is none.
    """
    rows = _ask(
        catalog,
        f"WITH {_WANTED} SELECT p.*, d.done FROM (SELECT * FROM state.part WHERE corpus = $1 AND part BETWEEN $3 "
        f"AND $4) p LEFT JOIN (SELECT s.part, list(w.place) AS done FROM {_MATCHED} WHERE s.corpus = $1 AND s.part "
        f"BETWEEN $3 AND $4 AND {_is_done(and_failed)} GROUP BY s.part) d USING (part) "
        "WHERE coalesce(len(d.done), 0) < len(($2).modality) ORDER BY part",
        [corpus, _columns(places), first, last],
    )
    return [Unfinished(part=as_action(PartAdded, row), done=frozenset(row["done"] or ())) for row in rows]


def not_whole(
    catalog: Catalog, corpus: str, places: Sequence[Place], first: int, last: int, *, and_failed: bool
) -> dict[int, dict[int, ShardAdded]]:
    """Returns the live shards of those parts that `unfinished` does not count as done: by part, by place."""
    rows = _ask(
        catalog,
        f"WITH {_WANTED} SELECT w.place, s.* FROM {_MATCHED} WHERE s.corpus = $1 AND s.part BETWEEN $3 AND $4 "
        f"AND NOT ({_is_done(and_failed)}) ORDER BY s.part, w.place",
        [corpus, _columns(places), first, last],
    )
    found: dict[int, dict[int, ShardAdded]] = {}
    for row in rows:
        found.setdefault(row["part"], {})[row["place"]] = as_action(ShardAdded, row)
    return found


def to_do(
    catalog: Catalog,
    corpus: str,
    places: Sequence[Place],
    *,
    retry: Collection[str] | None,
    among: Collection[int] | None = None,
) -> dict[str, int]:
    """Counts the parts (`parts`, with `rows` in all) that miss a whole shard at one of the places, and these `shards`.

    Shards with failed rows of a class of `retry` are none either (empty: of any class; None: they are whole). `among` are
    the parts that count; None: all.
    """
    return _ask(
        catalog,
        f"WITH {_WANTED} SELECT count(*) AS parts, coalesce(sum(p.rows), 0)::BIGINT AS rows, "
        "coalesce(sum(len(($2).modality) - coalesce(d.done, 0)), 0)::BIGINT AS shards FROM (SELECT part, rows FROM "
        "state.part WHERE corpus = $1 AND ($3::INTEGER[] IS NULL OR part IN (SELECT unnest($3::INTEGER[])))) p "
        f"LEFT JOIN (SELECT s.part, count(*) AS done FROM {_MATCHED} WHERE s.corpus = $1 AND s.not_selected = 0 "
        f"AND {'true' if retry is None else f'NOT {_is_failing(retry)}'} GROUP BY s.part) d USING (part) "
        "WHERE coalesce(d.done, 0) < len(($2).modality)",
        [corpus, _columns(places), None if among is None else list(among), *_classes(retry)],
    )[0]


def counts(
    catalog: Catalog,
    corpus: str,
    places: Sequence[Place],
    *,
    classes: Collection[str] = (),
    among: Collection[int] | None = None,
) -> dict[tuple[str, Form], Count]:
    """Returns how far each form of a modality is, of those that the places name.

    `classes` are those of the failures that count in `with_failures`, none: all. `among` are the parts that count, None: all.
    """
    rows = _ask(
        catalog,
        f"WITH {_WANTED}, asked AS (SELECT modality, form, fingerprint, count(*) AS needed FROM wanted GROUP BY ALL), "
        "by_part AS (SELECT a.modality, a.form, s.part, any_value(a.needed) AS needed, "
        "count(*) FILTER (WHERE is_wanted AND not_selected = 0) AS whole, "
        "count(*) FILTER (WHERE is_wanted) AS there, "
        "count(*) FILTER (WHERE is_wanted AND not_selected > 0) AS partial, "
        "coalesce(sum(failed) FILTER (WHERE is_wanted), 0) AS failed, "
        f"count(*) FILTER (WHERE is_wanted AND {_is_failing(classes)}) AS failing, "
        "arg_max(s.fingerprint, s.version) FILTER (WHERE s.fingerprint <> a.fingerprint) AS before, "
        "max(s.version) FILTER (WHERE s.fingerprint <> a.fingerprint) AS before_version "
        "FROM (SELECT s.*, w.place IS NOT NULL AS is_wanted FROM state.shard s LEFT JOIN wanted w "
        "ON w.modality = s.modality AND w.form = s.form AND w.fingerprint = s.fingerprint "
        "AND coalesce(w.crop, -1) = coalesce(s.crop, -1) WHERE s.corpus = $1 AND ($3::INTEGER[] IS NULL OR s.part IN "
        "(SELECT unnest($3::INTEGER[])))) s JOIN asked a ON a.modality = s.modality AND a.form = s.form "
        "GROUP BY a.modality, a.form, s.part) "
        "SELECT modality, form, count(*) FILTER (WHERE whole = needed) AS done, "
        "count(*) FILTER (WHERE partial > 0) AS partial, "
        "count(*) FILTER (WHERE failing > 0) AS with_failures, sum(failed)::BIGINT AS failed, "
        "count(*) FILTER (WHERE there > 0 AND there < needed) AS begun, "
        "count(*) FILTER (WHERE there < needed AND there = 0 AND before IS NOT NULL) AS stale, "
        "arg_max(before, before_version) FILTER (WHERE there = 0) AS before FROM by_part GROUP BY modality, form",
        [corpus, _columns(places), None if among is None else list(among), *_classes(classes)],
    )
    return {(row["modality"], row["form"]): Count(**row) for row in rows}


def failing(catalog: Catalog, corpus: str, classes: Collection[str]) -> set[tuple[int, str, Form, int | None]]:
    """Returns the current shards of a corpus that have a failed row of one of these classes: part, modality, form, crop."""
    rows = catalog.sql(
        "SELECT DISTINCT part, modality, form, crop FROM failures WHERE corpus = ? AND class IN (SELECT unnest(?::VARCHAR[]))",
        [corpus, sorted(classes)],
    )
    return {(row["part"], row["modality"], row["form"], row["crop"]) for row in rows.to_pylist()}


def image_inputs(catalog: Catalog, corpus: str) -> list[str]:
    """Returns what the current recipes of a corpus say of their input `image`: the versions of the decoder."""
    query = "SELECT DISTINCT inputs->>'image' AS image FROM recipes WHERE list_contains(current_in, ?)"
    return sorted(filter(None, catalog.sql(query, [corpus])["image"].to_pylist()))


def failure_classes(catalog: Catalog) -> list[str]:
    """Returns the classes of all failed rows."""
    return [row["class"] for row in catalog.sql("SELECT DISTINCT class FROM failures ORDER BY 1").to_pylist()]


def _columns(places: Sequence[Place]) -> dict[str, list[Any]]:
    names = ("modality", "form", "fingerprint", "crop")
    return {name: [place[number] for place in places] for number, name in enumerate(names)}


def _is_done(and_failed: bool) -> str:
    return "s.not_selected = 0 AND s.failed = 0" if and_failed else "s.not_selected = 0"


def _is_failing(classes: Collection[str]) -> str:
    """Returns a condition: a shard `s` has a failed row of these classes (parameter 4), or of any class if none is named."""
    of_class = (
        " AND (s.part, s.modality, s.form, coalesce(s.crop, -1)) IN (SELECT (part, modality, form, coalesce(crop, -1)) "
        "FROM failures WHERE corpus = $1 AND class IN (SELECT unnest($4::VARCHAR[])))"
    )
    return f"(s.failed > 0{of_class if classes else ''})"


def _classes(classes: Collection[str] | None) -> list[list[str]]:
    """Returns the parameter of `_is_failing`, if it has one."""
    return [sorted(classes)] if classes else []


def _ask(catalog: Catalog, query: str, parameters: Sequence[Any]) -> list[dict[str, Any]]:
    return catalog.sql(query, parameters).to_pylist()
