"""Samples in very many files: whatever is asked, the answer is that of a scan of all, from the files that can matter."""

from typing import Any

import duckdb
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from manifests.catalog.catalog import Catalog
from manifests.errors import QueryError
from manifests.log import entries as log
from manifests.store.storage import open_storage

PARTS = 40
# Keys of `photos` are sorted through its parts, those of `tars` are not; some look like what a plan says of filters.
ODD = ["it's", "(key = 'p000')", "a\nb", "(key = \n'p000')", "\\", "", "ü", "\x7f"]
KEYS = [f"p{number:03d}" for number in range(3 * PARTS)]
TARS = [ODD[part % len(ODD)] + f"-{part}" * (part >= len(ODD)) for part in range(PARTS)]
SAMPLES = "SELECT corpus, part, row, key, source, size_bytes FROM samples"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, make) -> Any:
    """Two corpora of 40 parts each, whose mixed columns have other types in the other corpus and in later parts."""
    folder = tmp_path_factory.mktemp("many")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODMILL_CACHE", str(folder / "cache"))
        storage = open_storage(folder / "work [1]")
        log.create_workspace(storage)
        parts = []
        for part in range(PARTS):
            keys = KEYS[3 * part : 3 * part + 3]
            columns = {"width": pa.array([part, part + 1, None])} if part % 2 else {}
            columns["mixed"] = pa.array([1, 2, 3])
            made = make.samples_file(storage, "photos", part, columns, keys)
            # Logs did not always say the range of a part's keys.
            parts.append((made, {"key_min": keys[0], "key_max": keys[-1]} if part % 5 else {}))
            keys = sorted([TARS[part], f"t{PARTS - part:03d}"])
            made = make.samples_file(storage, "tars", part, {"mixed": pa.array(["x", None])}, keys)
            parts.append((made, {"key_min": min(keys), "key_max": max(keys)}))
        with Catalog(storage) as catalog:
            known = [make.part(**{**vars(made), **ends}) for made, ends in parts]
            catalog.commit([make.corpus("photos"), make.corpus("tars"), *known], run="r")
            yield catalog


@pytest.fixture(scope="module")
def plain(many: Catalog) -> Any:
    """The same rows as one table, in a DuckDB of its own."""
    table = many.sql("SELECT * FROM samples")
    assert table.num_rows == 5 * PARTS
    with duckdb.connect() as connection:
        connection.register("rows", table)
        connection.execute("CREATE TABLE samples AS SELECT * FROM rows")
        yield connection


def same(many: Catalog, plain: Any, query: str, parameters: list[Any]) -> None:
    found = many.sql(query, parameters)
    expected = plain.sql(query, params=parameters)
    assert found.column_names == expected.columns
    assert sorted(map(repr, found.to_pylist())) == sorted(map(repr, expected.to_arrow_table().to_pylist()))


def literal(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


SOME_KEYS = st.sampled_from([*KEYS, *TARS, *ODD, "p", "p1", "q", "photos"])
SIGNS = st.sampled_from(["=", "<", "<=", ">", ">=", "<>"])
BASIC = st.one_of(
    st.builds(lambda sign, key: f"key {sign} {literal(key)}", SIGNS, SOME_KEYS),
    st.builds(lambda keys: f"key IN ({', '.join(map(literal, keys))})", st.lists(SOME_KEYS, min_size=1, max_size=5)),
    st.builds(lambda a, b: f"key BETWEEN {literal(a)} AND {literal(b)}", SOME_KEYS, SOME_KEYS),
    st.builds(lambda key: f"key LIKE {literal(key + '%')}", SOME_KEYS),
    st.builds(lambda sign, name: f"corpus {sign} '{name}'", SIGNS, st.sampled_from(["photos", "tars", "q"])),
    st.builds(lambda sign, part: f"part {sign} {part}", SIGNS, st.integers(-1, PARTS)),
    st.builds(lambda part: f"part IN ({part}, {part + 7})", st.integers(0, PARTS)),
    st.builds(lambda key: f"source = {literal(key + '.jpg')}", SOME_KEYS),
    st.sampled_from(["width > 20", "width IS NULL", "mixed = '2'", "mixed IS NULL", "size_bytes > 100", "row = 0"]),
)
CONDITIONS = st.recursive(
    BASIC,
    lambda inner: st.one_of(
        st.builds(lambda parts: "(" + " AND ".join(parts) + ")", st.lists(inner, min_size=2, max_size=3)),
        st.builds(lambda parts: "(" + " OR ".join(parts) + ")", st.lists(inner, min_size=2, max_size=3)),
        st.builds(lambda part: f"NOT ({part})", inner),
    ),
    max_leaves=5,
)
SHAPES = st.sampled_from(
    [
        "SELECT * FROM samples WHERE {0}",
        "SELECT corpus, count(*), sum(width), min(mixed) FROM samples WHERE {0} GROUP BY corpus",
        "SELECT * FROM samples WHERE {0} ORDER BY corpus, key LIMIT 3",
        "SELECT a.key, b.part FROM samples a JOIN samples b USING (corpus, key) WHERE a.{1}",
        "SELECT key FROM samples WHERE {0} UNION ALL SELECT key FROM samples WHERE {1}",
        "WITH s AS (SELECT * FROM samples WHERE {0}) SELECT count(*) FROM s x, s y WHERE x.{1}",
        "SELECT key, (SELECT count(*) FROM samples b WHERE b.key > a.key) FROM samples a WHERE {0}",
        "SELECT key FROM samples WHERE {0} AND key NOT IN (SELECT key FROM samples WHERE {1})",
        "SELECT count(*) FROM samples s LEFT JOIN (SELECT * FROM samples WHERE {0}) o USING (corpus, key) WHERE o.key IS NULL",
    ]
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=SHAPES, condition=CONDITIONS, other=BASIC)
@example(shape="SELECT * FROM samples WHERE {0}", condition="source = 'x'' AND (key = ''p000'')'", other="row = 0")
@example(shape="SELECT * FROM samples WHERE {0}", condition="source <> '\n(key = ''p000'')\n'", other="row = 0")
def test_any_condition_answers_as_a_scan_of_all(
    many: Catalog, plain: Any, shape: str, condition: str, other: str
) -> None:
    same(many, plain, shape.format(condition, other), [])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=SOME_KEYS, sign=SIGNS, corpus=st.sampled_from(["photos", "tars"]))
def test_parameters_are_conditions_too(many: Catalog, plain: Any, key: str, sign: str, corpus: str) -> None:
    same(many, plain, f"{SAMPLES} WHERE corpus = ? AND key {sign} ?", [corpus, key])


@pytest.mark.parametrize("sign", ["=", "<", "<=", ">", ">="])
def test_ends_of_ranges(many: Catalog, plain: Any, sign: str) -> None:
    for key in ("p002", "p003", "p004", "p005", "p006", "p114", "p116", "p117", "p118"):
        same(many, plain, f"{SAMPLES} WHERE corpus = 'photos' AND key {sign} '{key}'", [])
        same(many, plain, f"{SAMPLES} WHERE corpus = 'photos' AND key {sign} '{key}' AND part {sign} {key[2]}", [])


@pytest.mark.parametrize(
    ("condition", "files"),
    [
        # With the eight of `photos` whose range of keys is not known.
        ("corpus = 'photos' AND key = 'p004'", 9),
        ("key IN ('p004', 'p008') AND corpus = 'photos'", 10),
        ("key = 'p004' AND part = 1", 2),
        ("corpus = 'photos' AND part = 7", 1),
        ("corpus = 'photos' AND part = 7 AND key < 'p000'", 0),
    ],
)
def test_only_files_that_can_matter_are_read(many: Catalog, plain: Any, condition: str, files: int) -> None:
    same(many, plain, f"{SAMPLES} WHERE {condition}", [])
    macro = "SELECT macro_definition FROM duckdb_functions() WHERE function_name = 'sample_rows'"
    ((text,),) = many.fetch(macro)[1]
    assert "all_sample_rows" in text
    many._samples.fit(f"{SAMPLES} WHERE {condition}", [])  # type: ignore[union-attr]
    ((text,),) = many._index.connection.sql(macro).fetchall()
    assert text.count(".parquet") == files
    assert "_sample_rows" not in text


def test_what_is_asked_next_sees_all(many: Catalog) -> None:
    one = "SELECT count(*) FROM samples WHERE corpus = 'photos' AND key = 'p004'"
    for query, count in ((one, 1), ("FROM samples SELECT count(*)", 5 * PARTS), (one, 1)):
        assert many.sql(query).column(0).to_pylist() == [count]
    assert many.select_rows("key = 'p004'").num_rows == 1
    assert many.numbered_parts().num_rows == 2 * PARTS
    with pytest.raises(QueryError, match="nothing"):
        many.sql("SELECT nothing FROM samples WHERE corpus = 'photos' AND key = 'p004'")
    assert many.sql("SELECT count(*) FROM samples").column(0).to_pylist() == [5 * PARTS]
    assert many.sql("DESCRIBE samples").num_rows == many.sql("SELECT * FROM samples LIMIT 0").num_columns
    assert many.sql("EXPLAIN SELECT * FROM samples WHERE key = 'p004'").num_rows


def test_attached_columns_of_one_sample(many: Catalog, make) -> None:
    with Catalog(many.storage) as catalog:
        catalog.attach(
            pa.table({"corpus": ["photos"] * 2, "key": ["p004", "p100"], "score": [1.5, 2.5]}), name="scores"
        )
        found = catalog.sql("SELECT score, width FROM samples WHERE corpus = 'photos' AND key = 'p004'").to_pylist()
        assert found == [{"score": 1.5, "width": 2}]
        assert catalog.sql("SELECT sum(score) AS n FROM samples WHERE score > 2").to_pylist() == [{"n": 2.5}]


def test_new_parts_and_old_versions(many: Catalog, make) -> None:
    query = "SELECT part FROM samples WHERE corpus = 'photos' AND key = 'zzz'"
    with Catalog(many.storage) as writing, Catalog(many.storage, as_of=1) as old:
        assert writing.sql(query).num_rows == old.sql(query).num_rows == 0
        made = make.samples_file(many.storage, "other", PARTS, {}, ["zzz"])
        writing.commit([make.corpus("other"), made], run="r")
        asked = query.replace("photos", "other")
        assert writing.sql(asked).column(0).to_pylist() == [PARTS]
        assert old.sql(asked).num_rows == 0
