"""A user's own table beside the samples: its columns are theirs, once a sample, or it is refused in words."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifests.catalog import attached
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError, QueryError
from manifests.recipe import sha256_hex
from manifests.store.storage import Storage

KEYS = ["0012", "12e4", "abcd"]


@pytest.fixture
def catalog(workspace: Storage, make) -> Any:
    """Two corpora; `photos` has keys that look like numbers and a column of its own."""
    with Catalog(workspace) as opened:
        opened.commit(
            [
                make.corpus("photos"),
                make.corpus("texts"),
                make.samples_file(workspace, "photos", 0, {"width": pa.array([10, 20, 30])}, KEYS),
                make.samples_file(workspace, "texts", 0, {}, ["abcd"]),
            ],
            run="r",
        )
        yield opened


def scores(corpus: str = "photos", keys: list[Any] | None = None, **columns: list[Any]) -> pa.Table:
    keys = KEYS if keys is None else keys
    return pa.table({"corpus": [corpus] * len(keys), "key": keys, **(columns or {"aesthetic": [4.0, 5.5, 6.0]})})


def ask(catalog: Catalog, query: str) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in catalog.sql(query).to_pylist()]


def write_csv(table: pa.Table, path: Path, delimiter: str) -> None:
    lines = [table.column_names, *(map(str, row.values()) for row in table.to_pylist())]
    path.write_text("".join(delimiter.join(line) + "\n" for line in lines))


@pytest.fixture(params=["parquet", "csv", "tsv", "jsonl", "json", "pyarrow", "pandas"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """The scores, as a file or a table of each kind."""
    path = tmp_path / f"scores.{request.param}"
    match request.param:
        case "parquet":
            pq.write_table(scores(), path)
        case "csv":
            write_csv(scores(), path, ",")
        case "tsv":
            write_csv(scores(), path, "\t")
        case "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in scores().to_pylist()))
        case "json":
            path.write_text(json.dumps(scores().to_pylist()))
        case "pyarrow":
            return scores()
        case "pandas":
            pytest.importorskip("pandas")
            return scores().to_pandas()
    return path


def test_its_columns_are_columns_of_samples(catalog: Catalog, table: Any) -> None:
    found = catalog.attach(table, name="scores")
    assert (found.name, found.on, found.columns) == ("scores", ("corpus", "key"), ("aesthetic",))
    assert (found.rows, found.unmatched, found.sha256 is None) == (3, 0, not isinstance(table, Path))
    assert ask(catalog, "SELECT corpus, key, width, aesthetic FROM samples ORDER BY corpus, key") == [
        ("photos", "0012", 10, 4.0),
        ("photos", "12e4", 20, 5.5),
        ("photos", "abcd", 30, 6.0),
        ("texts", "abcd", None, None),
    ]
    assert ask(catalog, "SELECT sum(aesthetic) FROM scores") == [(15.5,)]


def test_conditions_of_snapshots_use_it(catalog: Catalog) -> None:
    catalog.attach(scores(), name="scores")
    assert sorted(catalog.select_rows("aesthetic > 5").column(0).to_pylist()) == [1, 2]
    assert catalog.select_rows("key IN (SELECT key FROM scores WHERE aesthetic < 5)").column(0).to_pylist() == [0]


def test_rows_that_match_no_sample_are_counted_and_said(catalog: Catalog) -> None:
    lost = scores(keys=["abcd", "gone", None], aesthetic=[1.0, 2.0, 3.0])
    found = catalog.attach(lost, name="lost")
    assert (found.rows, found.unmatched) == (3, 2)
    assert str(found) == "attached lost: 1 of 3 rows match a sample by corpus, key; samples has aesthetic of it"
    assert ask(catalog, "SELECT count(*), count(aesthetic) FROM samples") == [(4, 1)]


def test_joined_on_the_key_alone_or_on_any_other_column(catalog: Catalog) -> None:
    catalog.attach(pa.table({"KEY": ["abcd"], "Seen": [True]}), on=["key"], name="seen")
    assert ask(catalog, "SELECT corpus, seen FROM samples WHERE seen ORDER BY 1") == [("photos", True), ("texts", True)]
    catalog.attach(pa.table({"width": pa.array([20], pa.int8()), "size": ["small"]}), on=["width"], name="sizes")
    assert ask(catalog, "SELECT key, size FROM samples WHERE size = 'small'") == [("12e4", "small")]


def test_several_tables_and_new_parts(catalog: Catalog, make) -> None:
    catalog.attach(scores(), name="scores")
    catalog.attach(scores("texts", ["abcd", "new1"], license=["by", "nc"]), name="licenses")
    rows = "SELECT key, aesthetic, license FROM samples WHERE corpus = 'texts' ORDER BY key"
    assert ask(catalog, rows) == [("abcd", None, "by")]
    catalog.commit([make.samples_file(catalog.storage, "texts", 1, {}, ["new1"])], run="r")
    assert ask(catalog, rows) == [("abcd", None, "by"), ("new1", None, "nc")]


def test_it_stays_where_the_index_is_made_anew(catalog: Catalog) -> None:
    catalog.attach(scores(), name="scores")
    catalog._index.connection.close()
    catalog._index._start()
    catalog.refresh()
    assert ask(catalog, "SELECT count(aesthetic) FROM samples") == [(3,)]


def test_a_catalog_at_an_old_version(catalog: Catalog, make) -> None:
    catalog.commit([make.samples_file(catalog.storage, "texts", 1, {}, ["new1"])], run="r")
    with Catalog(catalog.storage, as_of=1) as old:
        assert old.attach(scores("texts", ["abcd", "new1"], license=["by", "nc"]), name="licenses").unmatched == 1
        assert ask(old, "SELECT count(license) FROM samples") == [(1,)]


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (scores(keys=["abcd"] * 3), {}, "mine has 3 rows of corpus 'photos', key 'abcd'; expected one row a sample"),
        (
            scores(),
            {"on": ["corpus", "kee"]},
            r"on=\['corpus', 'kee'\]: expected columns of samples, .* it has corpus, ",
        ),
        (scores(), {"on": []}, r"on=\[\]: expected columns of samples"),
        (scores(), {"on": ["key", "KEY"]}, "each once"),
        (scores(), {"on": ["width"]}, "expected columns of mine, each once; it has corpus, key, aesthetic"),
        (pa.table({"key": [12, 13]}), {"on": ["key"]}, "mine.key is BIGINT, samples.key is VARCHAR"),
        (scores(width=[1, 2, 3]), {}, "mine has a column 'width', and so has samples; give it another name in mine"),
        (scores(Source=["a", "b", "c"]), {}, "mine has a column 'source', and so has samples"),
        (scores(), {"name": None}, "a table that is no file needs a name"),
        (scores(), {"name": "my scores"}, "SQL takes no table called 'my scores'"),
        (scores(), {"name": "samples"}, "the name 'samples' is taken"),
        (scores(), {"name": "Coverage"}, "the name 'Coverage' is taken"),
        (scores(), {"name": "boxes"}, "the name 'boxes' is taken"),
        (scores(), {"name": "select"}, "the name 'select' is taken, by a view, another table or SQL itself"),
        (["a", "b"], {}, "list is no table; expected a file, or a table of pyarrow, pandas or polars"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(
    catalog: Catalog, given: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        catalog.attach(given, **{"name": "mine", **options})
    # Nothing of it is left, and another may have its name.
    catalog.attach(scores(), name="mine")
    assert ask(catalog, "SELECT count(aesthetic) FROM samples") == [(3,)]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("none.parquet", None, "there is no such file to attach"),
        ("sheet.xlsx", b"", "a file that is attached ends with one of .parquet, .csv"),
        ("broken.parquet", b"no parquet", "broken.parquet cannot be read as parquet: "),
        ("broken.json", b'{"key": ', "broken.json cannot be read as json: "),
        ("my-scores.csv", b"corpus,key\n", "SQL takes no table called 'my-scores'"),
    ],
)
def test_a_file_that_is_no_table_is_refused(
    catalog: Catalog, tmp_path: Path, name: str, data: bytes | None, message: str
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        catalog.attach(tmp_path / name)


def test_the_same_column_of_two_tables_is_refused(catalog: Catalog) -> None:
    catalog.attach(scores(), name="one")
    with pytest.raises(ConfigError, match="two has a column 'aesthetic', and so has one"):
        catalog.attach(scores(), name="two")
    with pytest.raises(QueryError, match="two does not exist"):
        catalog.sql("SELECT * FROM two")


def test_a_corpus_that_comes_with_its_column_is_said(catalog: Catalog, make) -> None:
    catalog.attach(scores(), name="scores")
    more = make.samples_file(catalog.storage, "texts", 1, {"aesthetic": pa.array([1.0])}, ["new1"])
    catalog.commit([more], run="r")
    with pytest.raises(ConfigError, match="scores has a column 'aesthetic', and so has samples"):
        catalog.sql("SELECT * FROM samples")


def test_the_option_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert attached.parse("scores.csv") == ("scores.csv", ("corpus", "key"))
    assert attached.parse("a/scores.csv:key, part") == ("a/scores.csv", ("key", "part"))
    (tmp_path / "odd:name.csv").write_bytes(b"key\n")
    assert attached.parse("odd:name.csv") == ("odd:name.csv", ("corpus", "key"))
    found = {"file": "odd:name.csv", "on": ["corpus", "key"], "sha256": sha256_hex(b"key\n")}
    assert attached.document("odd:name.csv") == found
