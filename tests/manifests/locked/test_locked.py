"""SQL from strangers: what it may ask, what is refused, what stops it, and that the answer is the plain one."""

import json
import os
import resource
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from manifests.catalog.catalog import Catalog
from manifests.errors import QueryError
from manifests.formats import shards
from manifests.locked import child, locked
from manifests.log import entries as log
from manifests.store import paths
from manifests.store.storage import open_storage

BOX = {"class": "dog", "score": 0.5, "x0": 0.0, "y0": 0.25, "x1": 0.5, "y1": 0.75}
FACTS = {"original_width": 640, "original_height": 480, "caption_n_chars": 10, "caption_n_words": 3}
FACTS |= {"caption_n_sentences": 1, "colorfulness": 0.5, "brightness": 100.0, "contrast": 2.0, "saturation": 0.25}
LABELS = {
    "boxes": [[BOX], [BOX, BOX], None],
    "instances": [[{**BOX, "rle_height": 4, "rle_width": 4, "rle_counts": [3, 13]}], [], None],
    "caption": ["a dog", "два пса", None],
    "palette": [[{"k": 1, "rank": 0, "r": 255, "g": 0, "b": 0, "share": 1.0}], [], None],
    "metadata": [{**FACTS, "entropy": 7.5}, {**FACTS, "entropy": 0.5}, None],
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for the module: the copy of the views is made once."""
    folder = tmp_path_factory.mktemp("locked-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODMILL_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def catalog(make, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    """A workspace whose views all have rows."""
    storage = open_storage(tmp_path_factory.mktemp("locked") / "work")
    log.create_workspace(storage)
    keys = ["a", "b", "c"]
    samples = make.samples_file(storage, "photos", 0, {"stars": pa.array([1.5, None, 3.0])}, keys)
    failure = {
        "corpus": "photos",
        "part": 0,
        "row": 2,
        "key": "c",
        "modality": "caption",
        "form": "label",
        "crop": None,
    }
    failure |= {"stage": "label", "class": "LabelError", "message": "it is blank"}
    failed = shards.write_failures([failure])
    failed_path = paths.failed(make.shard().path)
    storage.put(failed_path, failed)
    labels = [
        make.labels_file(storage, modality, keys, [0, 0, 1], values, failed_path=failed_path)
        if modality == "caption"
        else make.labels_file(storage, modality, keys, [0, 0, 1], values)
        for modality, values in LABELS.items()
    ]
    with Catalog(storage) as opened:
        opened.commit([make.run_started(), make.corpus(), samples], run="r1")
        opened.commit([*(make.current(modality=modality) for modality in LABELS), *labels], run="r1")
        opened.commit([make.corpus("texts", kind="text")], run="r1")
        yield opened


def refused(catalog: Catalog, query: str, **limits: Any) -> str:
    with pytest.raises(QueryError) as error:
        locked.ask(catalog, query, **limits)
    return str(error.value)


# -- what may be asked ------------------------------------------------------------------------------------------------


def test_every_view_says_what_it_says_unlocked(catalog: Catalog) -> None:
    views = locked.ask(catalog, "SHOW TABLES").column("name").to_pylist()
    promised = "corpora parts samples shards recipes coverage failures runs lineage timeline tokenizers snapshots"
    assert {*promised.split(), "boxes", "instances", "captions", "palettes", "metadata"} <= set(views)
    every = " UNION ALL ".join(
        f"SELECT '{view}' AS view, count(*) AS rows, bit_xor(hash(v))::VARCHAR AS digest FROM {view} v"
        for view in views
    )
    answer = locked.ask(catalog, every)
    assert answer == catalog.sql(every)
    rows = dict(zip(answer["view"].to_pylist(), answer["rows"].to_pylist(), strict=True))
    assert all(rows[view] for view in ("samples", "failures", "boxes", "instances", "captions", "palettes", "metadata"))


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM samples JOIN captions USING (corpus, part, key) ORDER BY key",
        "SELECT modality, sum(ok) AS ok, list(part) AS parts, {'a': max(size_bytes)} AS s FROM shards GROUP BY ALL ORDER BY 1",
        "WITH t AS (FROM boxes) SELECT class, avg(area), uuid() IS NULL, current_date IS NULL FROM t GROUP BY 1",
        "PIVOT shards ON modality USING sum(ok) GROUP BY corpus",
        "DESCRIBE samples",
        "EXPLAIN SELECT 1",
        "SELECT 1::HUGEINT, INTERVAL 1 MONTH, MAP {'a': 1}, 'x'::BLOB, DATE '2026-11-24', 'b'::ENUM('a', 'b'), [1.5], NULL",
        "SELECT * FROM samples WHERE false",
    ],
)
def test_the_answer_is_the_plain_one(catalog: Catalog, query: str) -> None:
    assert locked.ask(catalog, query) == catalog.sql(query)


def test_as_of_an_older_version(catalog: Catalog) -> None:
    with Catalog(catalog.storage, as_of=2) as then:
        assert locked.ask(then, "SELECT corpus FROM corpora").to_pylist() == [{"corpus": "photos"}]
    assert locked.ask(catalog, "FROM corpora").num_rows == 2


def test_sql_that_is_wrong_gets_duckdbs_message(catalog: Catalog) -> None:
    assert refused(catalog, "SELECT nope FROM samples").startswith('Binder Error: Referenced column "nope" not found')
    assert refused(catalog, "SELECT key::INTEGER FROM samples").startswith("Conversion Error: Could not convert")


# -- what is refused --------------------------------------------------------------------------------------------------

# {out} is a folder, {secret} a file.
ATTACKS = [
    "COPY samples TO '{out}/x.csv'",
    "COPY samples TO '{out}/x.parquet' (FORMAT parquet)",
    "COPY (SELECT 1) TO '/dev/stdout'",
    "COPY samples TO 's3://bucket/x.parquet'",
    "WITH w AS (COPY (SELECT 1) TO '{out}/x.csv') SELECT * FROM w",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{out}/x.csv'",
    "FROM query('WITH w AS (COPY (SELECT 1) TO ''{out}/x.csv'') SELECT * FROM w')",
    "EXPORT DATABASE '{out}/x'",
    "IMPORT DATABASE '{out}'",
    "FROM read_csv('{secret}')",
    "FROM read_text('{secret}')",
    "FROM read_blob('{secret}')",
    "FROM read_json('{secret}')",
    "FROM read_parquet('{secret}')",
    "FROM read_duckdb('{secret}')",
    "FROM glob('{out}/../*')",
    "FROM sniff_csv('{secret}')",
    "FROM parquet_metadata('{secret}')",
    "FROM '{secret}'",
    "FROM 's3://bucket/x.parquet'",
    "FROM query('FROM read_text(''{secret}'')')",
    "FROM query_table('{secret}')",
    "FROM json_execute_serialized_sql(json_serialize_sql('FROM read_text(''{secret}'')'))",
    "FROM read_text('/proc/self/environ')",
    "ATTACH '{out}/x.duckdb' AS x",
    "ATTACH ':memory:' AS x",
    "ATTACH 'https://localhost/x.duckdb' AS x",
    "DETACH workspace",
    "INSTALL httpfs",
    "LOAD httpfs",
    "LOAD '{secret}'",
    "UPDATE EXTENSIONS",
    "FROM duckdb_extensions()",
    "SET memory_limit = '100GB'",
    "SET lock_configuration = false",
    "SET allowed_directories = ['/']",
    "SET enable_external_access = true",
    "SET temp_directory = '{out}'",
    "SET profiling_output = '{out}/x.json'",
    "SET log_query_path = '{out}/x.log'",
    "SET VARIABLE x = 1",
    "RESET memory_limit",
    "PRAGMA threads = 64",
    "PRAGMA enable_profiling",
    "CALL enable_logging()",
    "FROM enable_logging('QueryLog', storage := 'file', storage_path := '{out}/x')",
    """FROM "enable_profiling"(format := 'json', save_location := '{out}/x.json')""",
    "FROM query('FROM enable_profiling(save_location := ''{out}/x.json'')')",
    "FROM create_external_resource('x')",
    "CREATE TABLE x (a INTEGER)",
    "CREATE TEMP TABLE x AS SELECT 1",
    "CREATE MACRO x() AS 1",
    "CREATE SECRET s (TYPE s3)",
    "INSERT INTO samples FROM samples",
    "UPDATE samples SET key = 'x'",
    "DELETE FROM samples",
    "DROP TABLE samples",
    "ALTER TABLE samples ADD COLUMN x INTEGER",
    "SELECT getenv('HOME')",
    "FROM catalog",
    "FROM pandas_scan(0)",
    "BEGIN TRANSACTION",
    "PREPARE x AS SELECT 1",
    "VACUUM",
    "FORCE CHECKPOINT",
    "SELECT 1; SELECT 2",
]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A folder to write to, a file to read, and what stands in that."""
    folder, word = tmp_path_factory.mktemp("ground"), secrets.token_hex(8)
    (folder / "out").mkdir()
    (folder / "secret.csv").write_text(f"a,b\n1,{word}\n")
    return folder / "out", folder / "secret.csv", word


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused(catalog: Catalog, ground: tuple[Path, Path, str], attack: str) -> None:
    out, secret, word = ground
    # The binding has kinds of errors for what was never there to be refused: a function, a variable of Python.
    expected = ("refused: ", "Catalog Error: ", "Binder Error: ")
    message = refused(catalog, attack.replace("{out}", str(out)).replace("{secret}", str(secret)))
    assert message.startswith(expected), message
    assert word not in message
    assert list(out.iterdir()) == []


UNGATED = """
import json, os, sys
from manifests.locked import child
connection = child._open(500_000_000)
for attack in json.loads(sys.argv[1]):
    try:
        print(connection.execute(attack).fetchall())
    except Exception as error:
        print(error)
"""


def test_the_profile_holds_where_the_gate_lets_all_through(
    catalog: Catalog, ground: tuple[Path, Path, str], tmp_path: Path
) -> None:
    out, secret, word = ground
    catalog.copy_views(tmp_path / child.DATABASE)
    attacks = [attack.replace("{out}", str(out)).replace("{secret}", str(secret)) for attack in ATTACKS]
    done = subprocess.run(
        [sys.executable, "-c", UNGATED, json.dumps(attacks)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(locked.__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert word not in done.stdout
    assert [*out.iterdir(), *tmp_path.iterdir()] == []


def test_what_still_tells_of_the_machine_is_what_is_documented(catalog: Catalog, cache: Path) -> None:
    told = "SELECT path AS told FROM duckdb_databases() UNION ALL SELECT value FROM duckdb_settings()"
    paths = {value for value in locked.ask(catalog, told)["told"].to_pylist() if value and "/" in value}
    # A version, a time zone, and the copy in the cache folder; no folder of the home, nothing of the workspace.
    assert all(str(cache) in path or path.startswith(("python/", "/nonexistent/", "Etc/")) for path in paths), paths


# -- what stops it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bomb",
    [
        "SELECT list_sum(range(2000000000))",
        "SELECT repeat('x', 4000000000)",
        "SELECT length(string_agg(repeat('x', 1000000), '')) FROM range(100000)",
        "SELECT list(range) FROM range(1000000000)",
        "SELECT repeat('x', 50000) FROM range(100000)",
    ],
)
def test_memory_bombs_end_at_the_limit_and_leave_the_parent_small(catalog: Catalog, bomb: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = refused(catalog, bomb, memory_bytes=300_000_000)
    assert message == "stopped: it took more than 0.3 GB of memory; ask for less, or give more with --memory"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # KiB


@pytest.mark.parametrize(
    "bomb",
    [
        "SELECT count(*) FROM range(100000) a, range(100000) b, range(100000) c WHERE a.range * b.range = c.range",
        "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT max(n) FROM t",
        "SELECT count(*) FROM range(1000000000000)",
        "SELECT " + "[" * 900 + "]" * 900,
    ],
)
def test_time_bombs_end_at_the_limit(catalog: Catalog, bomb: str) -> None:
    began = time.monotonic()
    assert refused(catalog, bomb, timeout_s=0.5).startswith("stopped after 0.5 s; ask for less")
    assert time.monotonic() - began < 15


def test_long_answers_end_at_the_caps(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locked, "MAX_ROWS", 10)
    assert locked.ask(catalog, "FROM range(10)").num_rows == 10
    assert refused(catalog, "FROM range(11)").startswith("refused: the answer is over 10 rows")
    monkeypatch.setattr(locked, "MAX_BYTES", 1 << 20)
    assert "1 MiB" in refused(catalog, "SELECT repeat('x', 2000000)")


def test_a_process_that_does_not_end_itself_is_ended(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locked, "_START_S", 0.2)
    monkeypatch.setattr(
        locked, "_PROGRAM", "import signal, time; signal.signal(signal.SIGALRM, signal.SIG_IGN); time.sleep(60)"
    )
    began = time.monotonic()
    assert refused(catalog, "SELECT 1", timeout_s=0.2).startswith("stopped after 0.2 s")
    monkeypatch.setattr(locked, "_PROGRAM", "import os\nwhile True: os.write(1, bytes(1 << 20))")
    monkeypatch.setattr(locked, "_START_S", 20)
    monkeypatch.setattr(locked, "MAX_BYTES", 1 << 20)
    assert refused(catalog, "SELECT 1").startswith("refused: the answer is over")
    assert time.monotonic() - began < 15


# -- what comes back is not trusted -----------------------------------------------------------------------------------


class Foreign(pa.ExtensionType):
    def __init__(self) -> None:
        super().__init__(pa.int64(), "foreign")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> "Foreign":
        raise AssertionError("made from bytes that are not trusted")


def stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def test_an_answer_is_an_arrow_stream_of_plain_types() -> None:
    plain = pa.table({"a": [1, None], "b": [["x"], []]})
    assert locked.read_answer(stream(plain)) == plain
    for rubbish in (b"", b"rubbish" * 100, stream(plain)[:100]):
        with pytest.raises(QueryError, match="no whole Arrow stream"):
            locked.read_answer(rubbish)
    foreign = pa.ExtensionArray.from_storage(Foreign(), pa.array([1]))
    nested = pa.StructArray.from_arrays([foreign], names=["x"])
    for column in (foreign, nested):
        with pytest.raises(QueryError, match="cast it to VARCHAR"):
            locked.read_answer(stream(pa.table({"a": column})))


def test_an_answer_whose_offsets_lie_is_refused() -> None:
    lying = pa.StringArray.from_buffers(
        2, pa.py_buffer(bytes([0, 0, 0, 0, 255, 0, 0, 0, 1, 0, 0, 0])), pa.py_buffer(b"x")
    )
    with pytest.raises(QueryError, match="no whole Arrow stream"):
        locked.read_answer(stream(pa.table({"a": lying})))


# -- the copy ---------------------------------------------------------------------------------------------------------


def test_the_copy_is_private_and_made_once_a_version(
    catalog: Catalog, make, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cache / catalog.workspace_id / "locked"
    locked.ask(catalog, "SELECT 1")
    copies = {path.name: path.stat().st_ino for path in folder.iterdir()}
    locked.ask(catalog, "SELECT 1")
    assert {path.name: path.stat().st_ino for path in folder.iterdir()} == copies
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(path.suffix == ".duckdb" and path.stat().st_mode & 0o777 == 0o400 for path in folder.iterdir())
    monkeypatch.setattr(locked, "_KEPT", 1)
    catalog.commit([make.corpus("more")], run="r2")
    assert {"corpus": "more"} in locked.ask(catalog, "SELECT corpus FROM corpora").to_pylist()
    (left,) = folder.iterdir()
    assert left.name not in copies
    locked.clear(catalog.workspace_id)
    assert not folder.exists()
    assert locked.ask(catalog, "SELECT 1 AS one").to_pylist() == [{"one": 1}]


def test_a_cache_that_cannot_be_written_is_said(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from manifests.errors import WorkspaceError

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MODMILL_CACHE", str(tmp_path / "file"))
    with pytest.raises(WorkspaceError, match="set MODMILL_CACHE"):
        locked.ask(catalog, "SELECT 1")


def test_the_process_has_no_environment_of_ours(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    monkeypatch.setattr(locked, "_PROGRAM", "import os, sys; sys.exit(repr(sorted(os.environ)))")
    message = refused(catalog, "SELECT 1")
    assert "HOME" in message
    assert "AWS" not in message
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == "canary"
