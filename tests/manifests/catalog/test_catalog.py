"""What is asked of a workspace: the promised views, what they count, SQL that only reads, and commits by many."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from manifests.catalog.catalog import Catalog
from manifests.catalog.content import CONTENT_VIEWS
from manifests.errors import LogError, QueryError, UserError
from manifests.log import actions
from manifests.log import entries as log
from manifests.recipe import Recipe, canonical_json
from manifests.store import paths
from manifests.store.storage import Storage

ROOT = Path(__file__).parents[3]


@pytest.fixture
def catalog(workspace: Storage) -> Any:
    with Catalog(workspace) as opened:
        yield opened


def ask(catalog: Catalog, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in catalog.sql(query, parameters).to_pylist()]


# -- views ------------------------------------------------------------------------------------------------------------


def test_every_view_answers_for_a_workspace_that_is_empty(catalog: Catalog) -> None:
    views = catalog.sql("SELECT view_name FROM duckdb_views() WHERE NOT internal AND schema_name = 'main'")
    names = {*views["view_name"].to_pylist(), *CONTENT_VIEWS}
    assert {view: catalog.sql(f"FROM {view}").num_rows for view in names} == dict.fromkeys(names, 0)


def test_corpora_count_their_parts_and_changed_sources(catalog: Catalog, make) -> None:
    catalog.commit([make.corpus(), make.corpus("texts", kind="text")], run="r")
    catalog.commit([make.part(part=0, rows=4), make.part(part=1, rows=3)], run="r")
    catalog.commit(
        [actions.SourcesChanged(corpus="photos", path=paths.changes("photos", "aa" * 32), vanished=5, changed=6)],
        run="r",
    )
    catalog.commit(
        [actions.SourcesChanged(corpus="photos", path=paths.changes("photos", "bb" * 32), vanished=1, changed=2)],
        run="r",
    )
    catalog.commit([make.corpus(source="elsewhere", config={"kind": "image", "glob": "*.jpg"})], run="r")
    query = "SELECT corpus, kind, source, parts, samples, source_bytes, vanished, changed FROM corpora"
    assert ask(catalog, query) == [
        ("photos", "image", "elsewhere", 2, 7, 200, 1, 2),
        ("texts", "text", "photos", 0, 0, 0, 0, 0),
    ]
    assert [json.loads(row["config"]) for row in catalog.corpora()] == [
        {"kind": "image", "glob": "*.jpg"},
        {"kind": "image"},
    ]


def test_recipes_and_what_they_are_made_from(catalog: Catalog, make) -> None:
    label = Recipe(modality="rgb", form="label", producer="rgb", version=2, crop={"seed": 1}, parameters={"size": 224})
    token = Recipe(
        modality="rgb",
        form="token",
        producer="grid",
        version=1,
        weights="5e" * 32,
        inputs={"rgb": label.fingerprint, "palette": "v3"},
    )
    added = [actions.RecipeAdded(fingerprint=r.fingerprint, document=r.document()) for r in (label, token)]
    # The same recipe may be recorded by every run that uses it.
    catalog.commit([*added, *added], run="r")
    catalog.commit([make.current(modality="rgb", fingerprint=label.fingerprint, crops=1)], run="r")
    catalog.commit([make.current("texts", modality="rgb", fingerprint=label.fingerprint, crops=1)], run="r")
    assert catalog.recipes().keys() == {label.fingerprint, token.fingerprint}
    query = "SELECT recipe, modality, form, producer, producer_version, weights, current_in, fingerprint FROM recipes"
    assert ask(catalog, query) == [
        (label.fingerprint[:12], "rgb", "label", "rgb", 2, None, ["photos", "texts"], label.fingerprint),
        (token.fingerprint[:12], "rgb", "token", "grid", 1, "5e" * 32, [], token.fingerprint),
    ]
    (parameters,) = ask(catalog, "SELECT parameters, crop FROM recipes WHERE form = 'label'")
    assert [json.loads(value) for value in parameters] == [{"size": 224}, {"seed": 1}]
    query = "SELECT recipe, form, producer, input, input_recipe FROM lineage ORDER BY input"
    assert ask(catalog, query) == [
        (token.fingerprint[:12], "token", "grid", "palette", "v3"),
        (token.fingerprint[:12], "token", "grid", "rgb", label.fingerprint[:12]),
    ]


def test_runs_say_how_they_ended(catalog: Catalog, make) -> None:
    catalog.commit([make.run_started("r1", versions={"duckdb": "2"}, config={"a": 1})], run="r1")
    catalog.commit([make.run_started("r2", kind="verify", commit="abc", host="mill")], run="r2")
    ended = actions.RunEnded(run="r1", time="2026-11-23T10:01:30.500000Z", status="over_budget", counts={"failed": 3})
    catalog.commit([ended], run="r1")
    query = "SELECT run, kind, status, time_s, host, \"commit\", counts ->> 'failed' FROM runs"
    assert ask(catalog, query) == [
        ("r1", "run", "over_budget", 90.5, "h", None, "3"),
        ("r2", "verify", "running or killed", None, "mill", "abc", None),
    ]
    (times,) = ask(catalog, "SELECT started_at::VARCHAR, ended_at::VARCHAR FROM runs WHERE run = 'r1'")
    assert times == ("2026-11-23 10:00:00", "2026-11-23 10:01:30.5")


def test_the_newest_tokenizer_of_a_name_is_in_use(catalog: Catalog) -> None:
    def fitted(name: str, digest: str, loss: float) -> actions.TokenizerAdded:
        return actions.TokenizerAdded(
            name=name,
            digest=digest * 32,
            path=paths.tokenizer(name, digest * 32),
            family="grid",
            family_version=1,
            vocabulary=1024,
            options={"size": 224},
            rows=100,
            metrics={"loss": loss},
        )

    old, new, other = fitted("rgb", "a1", 0.5), fitted("rgb", "b2", 0.25), fitted("depth", "c3", 0.125)
    assert catalog.tokenizer("rgb") is None
    for action in (old, other, new):
        catalog.commit([action], run="r")
    assert catalog.tokenizer("rgb") == new
    assert catalog.tokenizers() == [other, new]
    query = "SELECT name, digest, metrics ->> 'loss', is_current FROM tokenizers"
    assert ask(catalog, query) == [
        ("depth", "c3" * 6, "0.125", True),
        ("rgb", "a1" * 6, "0.5", False),
        ("rgb", "b2" * 6, "0.25", True),
    ]


def test_records_come_back_as_they_were_committed(catalog: Catalog, make) -> None:
    parts = [make.part(part=number, sha256=f"{number:02x}" * 32) for number in range(3)]
    crops = [make.shard(modality="rgb", form="token", crop=crop, tokens=5, vocabulary=1024) for crop in (0, 1)]
    whole = make.shard(
        micro_batch=8, device="cuda", failed_path=paths.failed(make.shard().path), failed_sha256="05" * 32
    )
    catalog.commit([*parts[::-1], *crops, whole, make.shard("texts")], run="r")
    assert catalog.parts("photos") == parts
    assert catalog.parts("texts") == []
    assert catalog.live_shards("photos") == [whole, *crops]
    assert len(catalog.live_shards()) == 4
    recipe = make.current(modality="rgb", form="token", crops=2)
    catalog.commit([recipe, make.current("texts")], run="r")
    assert catalog.current_recipes("photos") == {("rgb", "token"): recipe}


# -- coverage ---------------------------------------------------------------------------------------------------------


def coverage(catalog: Catalog, *columns: str) -> list[tuple[Any, ...]]:
    return ask(catalog, f"SELECT {', '.join(columns)} FROM coverage")


COUNTS = ("parts", "parts_done", "parts_missing", "rows", "ok", "failed", "absent", "tokens", "size_bytes")


def test_a_part_is_missing_until_its_shard_is_there(catalog: Catalog, make) -> None:
    catalog.commit([make.corpus(), make.part(part=0), make.part(part=1, rows=2), make.current()], run="r")
    assert coverage(catalog, *COUNTS) == [(2, 0, 2, 6, 0, 0, 0, 0, 0)]
    catalog.commit([make.shard(part=1, rows=2, ok=1, absent=1)], run="r")
    assert coverage(catalog, *COUNTS) == [(2, 1, 1, 6, 1, 0, 1, 0, 1000)]
    assert [(row["done"], row["missing"], row["mb"]) for row in catalog.status().to_pylist()] == [(1, 1, 0.0)]


def test_a_replaced_shard_counts_once(catalog: Catalog, make) -> None:
    catalog.commit([make.part(), make.current(), make.shard(ok=1, failed=3)], run="r")
    assert coverage(catalog, "ok", "failed", "parts_with_failures", "size_bytes") == [(1, 3, 1, 1000)]
    catalog.commit([make.shard(ok=3, failed=1, size_bytes=1500)], run="r")
    assert coverage(catalog, "ok", "failed", "parts_with_failures", "size_bytes") == [(3, 1, 1, 1500)]
    # Twice in one commit: the later one holds.
    catalog.commit([make.shard(ok=2, failed=2), make.shard(ok=4, failed=0, size_bytes=1600)], run="r")
    assert coverage(catalog, "ok", "failed", "parts_with_failures", "size_bytes") == [(4, 0, 0, 1600)]
    assert ask(catalog, "SELECT count(*) FROM shards") == [(1,)]


def test_one_more_crop_makes_parts_missing(catalog: Catalog, make) -> None:
    def crop(part: int, number: int) -> actions.ShardAdded:
        return make.shard(part=part, modality="rgb", form="token", crop=number, tokens=784)

    catalog.commit([make.part(part=0), make.part(part=1)], run="r")
    catalog.commit([make.current(modality="rgb", form="token", crops=1), crop(0, 0), crop(1, 0)], run="r")
    assert coverage(catalog, "crops", "parts_done", "parts_missing", "rows", "tokens") == [(1, 2, 0, 8, 1568)]
    catalog.commit([make.current(modality="rgb", form="token", crops=2)], run="r")
    assert coverage(catalog, "crops", "parts_done", "parts_missing", "rows", "tokens") == [(2, 0, 2, 16, 1568)]
    catalog.commit([crop(1, 1)], run="r")
    assert coverage(catalog, "crops", "parts_done", "parts_missing", "rows", "tokens") == [(2, 1, 1, 16, 2352)]
    catalog.commit([make.current(modality="rgb", form="token", crops=1)], run="r")
    assert coverage(catalog, "crops", "parts_done", "parts_missing", "rows", "tokens") == [(1, 2, 0, 8, 1568)]
    query = "SELECT part, crop FROM shards WHERE is_current ORDER BY ALL"
    assert ask(catalog, query) == [(0, 0), (1, 0)]


def test_another_recipe_starts_over_and_the_old_one_comes_back(catalog: Catalog, make) -> None:
    catalog.commit([make.part(), make.current(), make.shard()], run="r")
    assert coverage(catalog, "recipe", "parts_done", "ok") == [(make.recipe_1[:12], 1, 4)]
    catalog.commit([make.current(fingerprint=make.recipe_2)], run="r")
    assert coverage(catalog, "recipe", "parts_done", "ok") == [(make.recipe_2[:12], 0, 0)]
    catalog.commit([make.shard(fingerprint=make.recipe_2, ok=2, absent=2)], run="r")
    assert coverage(catalog, "recipe", "parts_done", "ok") == [(make.recipe_2[:12], 1, 2)]
    assert ask(catalog, "SELECT recipe, is_current FROM shards ORDER BY recipe") == [
        (make.recipe_1[:12], False),
        (make.recipe_2[:12], True),
    ]
    catalog.commit([make.current()], run="r")
    assert coverage(catalog, "recipe", "parts_done", "ok") == [(make.recipe_1[:12], 1, 4)]


def test_corpora_modalities_and_forms_do_not_mix(catalog: Catalog, make) -> None:
    catalog.commit([make.part(), make.part("texts"), make.part("texts", 1)], run="r")
    for corpus in ("photos", "texts"):
        for form in ("label", "token"):
            catalog.commit([make.current(corpus, form=form)], run="r")
    catalog.commit([make.shard("texts", form="token", tokens=9), make.shard("photos")], run="r")
    found = coverage(catalog, "corpus", "form", "parts", "parts_done", "tokens")
    assert found == [
        ("photos", "label", 1, 1, 0),
        ("photos", "token", 1, 0, 0),
        ("texts", "label", 2, 0, 0),
        ("texts", "token", 2, 1, 9),
    ]


def test_rows_that_were_not_wanted_are_accounted_for(catalog: Catalog, make) -> None:
    catalog.commit([make.part(), make.current(), make.shard(ok=1, not_selected=2, forgotten=1)], run="r")
    assert coverage(catalog, "rows", "ok", "not_selected_or_forgotten") == [(4, 1, 3)]


# -- SQL only reads ---------------------------------------------------------------------------------------------------

READS = [
    "SELECT count(*) AS n FROM corpora",
    "select n from (select count(*) as n from CORPORA);",
    "WITH c AS (SELECT * FROM corpora) SELECT count(*) FROM c",
    "FROM corpora",
    "VALUES (1), (2)",
    "EXPLAIN SELECT * FROM coverage",
    "EXPLAIN ANALYZE SELECT * FROM coverage",
    "explain (format json) select * from coverage",
    "DESCRIBE shards",
    "DESCRIBE samples",
    "SHOW TABLES",
    "SUMMARIZE parts",
    "PIVOT (SELECT corpus, kind FROM corpora) ON kind USING count(*)",
    "SELECT 'COPY t TO x; DROP TABLE y' AS text -- COPY",
    'SELECT 1 AS "copy"',
    "SELECT '写真' AS text, 'copy' AS other",
    "SELECT * FROM corpora /* a comment; COPY */",
    "SELECT * FROM boxes b JOIN samples s USING (corpus, key) JOIN captions USING (corpus, key)",
]
WRITES = [
    "INSERT INTO log.corpus (corpus) VALUES ('x')",
    "WITH x AS (SELECT 1) INSERT INTO log.run_ended (version) SELECT * FROM x",
    "WITH x AS (INSERT INTO log.corpus (corpus) VALUES ('x') RETURNING corpus) SELECT * FROM x",
    "UPDATE log.corpus SET corpus = 'x'",
    "DELETE FROM log.corpus",
    "TRUNCATE log.corpus",
    "DROP TABLE log.corpus CASCADE",
    "DROP VIEW corpora",
    "ALTER TABLE log.corpus ADD COLUMN x INTEGER",
    "CREATE TABLE x AS SELECT 1",
    "CREATE TEMP TABLE x AS SELECT 1",
    "CREATE OR REPLACE VIEW corpora AS SELECT 1",
    "COPY log.corpus TO 'out.csv'",
    "COPY (SELECT 1) TO 'out.parquet'",
    "WITH x AS (COPY log.corpus TO 'out.csv') SELECT * FROM x",
    """WITH "写真" AS (COPY log.corpus TO 'out.csv') SELECT * FROM "写真" """,
    "with x as (copy log.corpus to 'out.csv') select * from x",
    "WITH x AS (COPY log.corpus TO 'out.csv') PIVOT x ON Count USING sum(Count)",
    "EXPLAIN ANALYZE COPY log.corpus TO 'out.csv'",
    "UPDATE EXTENSIONS",
    "FROM enable_logging('QueryLog', storage := 'file', storage_path := 'out')",
    """SELECT * FROM "Enable_Profiling" (format := 'json', save_location := 'out.json')""",
    "FROM create_external_resource('x')",
    "EXPLAIN ANALYZE INSERT INTO log.corpus (corpus) VALUES ('x')",
    "EXPLAIN (ANALYZE) INSERT INTO log.corpus (corpus) VALUES ('x')",
    "EXPLAIN (FORMAT JSON, ANALYZE) DELETE FROM log.corpus",
    "EXPLAIN /* */ ANALYZE DELETE FROM log.corpus",
    "explain analyze set threads = 1",
    "EXPORT DATABASE 'out'",
    "IMPORT DATABASE 'out'",
    "ATTACH 'out.duckdb' AS x",
    "DETACH memory",
    "USE memory",
    "SET threads = 1",
    "SET VARIABLE x = 1",
    "RESET threads",
    "PRAGMA threads = 1",
    "PRAGMA database_list",
    "CALL pragma_version()",
    "CHECKPOINT",
    "VACUUM",
    "BEGIN",
    "COMMIT",
    "ROLLBACK",
    "INSTALL httpfs",
    "LOAD httpfs",
    "PREPARE x AS SELECT 1",
    "EXECUTE x",
    "SELECT 1; SELECT 2",
    "SELECT 1; DROP VIEW corpora",
    "",
    "  -- only a comment",
]


@pytest.fixture
def small(catalog: Catalog, make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Catalog:
    """A catalog of one corpus; the working folder is an empty one."""
    catalog.commit([make.corpus()], run="r")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return catalog


def test_queries_that_read_are_answered(small: Catalog) -> None:
    for query in READS:
        assert small.sql(query).num_columns > 0, query
    assert ask(small, READS[0]) == ask(small, READS[1]) == [(1,)]
    assert ask(small, "SELECT corpus FROM corpora WHERE kind = ? AND seed = ?", "image", 0) == [("photos",)]


def test_statements_that_write_are_refused(small: Catalog, make) -> None:
    before = ask(small, "SELECT * FROM corpora")
    settings = ask(small, "SELECT value FROM duckdb_settings() WHERE name = 'threads'")
    for query in WRITES:
        with pytest.raises(QueryError) as refusal:
            small.sql(query)
        assert isinstance(refusal.value, UserError)
        assert str(refusal.value), query
        assert ask(small, "SELECT * FROM corpora") == before, query
    assert os.listdir() == []
    assert ask(small, "SELECT value FROM duckdb_settings() WHERE name = 'threads'") == settings
    small.commit([make.part()], run="r")
    assert len(small.parts("photos")) == 1


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELEC 1", "syntax error"),
        ("SELECT * FROM", "syntax error"),
        ("SELECT 'open", "unterminated"),
        ("SELECT * FROM corporas", 'Did you mean "corpora"'),
        ("SELECT corpuss FROM corpora", "corpus"),
        ("SELECT * FROM samples WHERE nothing = 1", "nothing"),
        ("SELECT 1 / 'x'", "Conversion Error"),
        ("SELECT ?", "[Pp]arameter|values"),
        ("DROP TABLE x", "DROP is refused, a workspace is only read by SQL: DROP TABLE x"),
        ("SELECT 1; SELECT 2", "one query is expected, these are 2"),
        ("", "one query is expected, these are 0"),
        ("SELECT copy FROM corpora", 'COPY is refused.*a name is written "copy"'),
    ],
)
def test_a_query_that_is_not_right_is_the_users_mistake(small: Catalog, query: str, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        small.sql(query)
    assert ask(small, "SELECT corpus FROM corpora") == [("photos",)]


def test_variables_of_python_are_no_tables(small: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    # DuckDB looks for names in the frame that calls it.
    monkeypatch.setattr("manifests.catalog.catalog.secret", small.sql("SELECT 1 AS a"), raising=False)
    with pytest.raises(QueryError, match="secret"):
        small.sql("SELECT * FROM secret")


# -- commits ----------------------------------------------------------------------------------------------------------


def test_two_catalogs_take_turns_without_losing_anything(catalog: Catalog, make) -> None:
    with Catalog(catalog.storage) as other:
        for number in range(6):
            # Neither refreshes: each finds its next version taken, replays, and takes the one after.
            assert catalog.commit([make.part(part=number)], run="one") == 2 * number + 1
            assert other.commit([make.part("texts", part=number)], run="two") == 2 * number + 2
        assert catalog.refresh() == other.version == 12
        for corpus in ("photos", "texts"):
            assert catalog.parts(corpus) == other.parts(corpus) == [make.part(corpus, number) for number in range(6)]
        timeline = "SELECT version, run, actions FROM timeline"
        assert ask(catalog, timeline) == [(n + 1, ("one", "two")[n % 2], 1) for n in range(12)]
    assert [entry.version for entry in log.entries(catalog.storage)] == list(range(1, 13))


COMMITS = """
import sys
from manifests.catalog.catalog import Catalog
from manifests.catalog.content import CONTENT_VIEWS
from manifests.log.actions import PartAdded
from manifests.store import paths
with Catalog.open(sys.argv[1]) as catalog:
    print("ready", flush=True)
    sys.stdin.readline()
    for part in range(12):
        catalog.commit([PartAdded(corpus=sys.argv[2], part=part, rows=1, sha256="01" * 32, size_bytes=1,
                                  path=paths.samples(sys.argv[2], part, "01" * 32),
                                  keys_sha256="02" * 32, source_bytes=1)], run=sys.argv[2])
"""


def test_two_processes_commit_at_the_same_time(catalog: Catalog) -> None:
    def start(corpus: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", COMMITS, catalog.storage.uri, corpus]
        return subprocess.Popen(command, stdin=-1, stdout=-1, text=True, cwd=ROOT)

    writers = [start("one"), start("two")]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    assert catalog.refresh() == 24
    assert ask(catalog, "SELECT corpus, count(*), count(DISTINCT part) FROM parts GROUP BY ALL ORDER BY ALL") == [
        ("one", 12, 12),
        ("two", 12, 12),
    ]


def test_a_commit_that_json_cannot_hold_changes_nothing(catalog: Catalog, make) -> None:
    with pytest.raises(ValueError, match="JSON"):
        catalog.commit([make.part(), make.run_started(config={"lr": float("nan")})], run="r")
    assert catalog.version == 0
    assert catalog.storage.names(paths.LOG) == []
    catalog.commit([make.part()], run="r")
    assert len(catalog.parts("photos")) == 1


def test_a_version_that_is_taken_by_rubbish_is_an_error(catalog: Catalog, make) -> None:
    catalog.storage.put(paths.log_entry(1), b"rubbish")
    with pytest.raises(LogError, match=r"0001\.json cannot be read"):
        catalog.commit([make.part()], run="r")


def test_an_action_of_a_later_modmill_is_passed_over(catalog: Catalog, make) -> None:
    later = {"action": "forgotten_key", "corpus": "photos", "key": "k"}
    part = {**actions.to_json(make.part()), "mood": "sunny"}
    document = {"format": 1, "version": 1, "txn": "0" * 32, "run": "r", "time": log.now(), "previous": None}
    catalog.storage.put(paths.log_entry(1), canonical_json({**document, "actions": [later, part]}))
    assert catalog.refresh() == 1
    assert catalog.parts("photos") == [make.part()]


def test_a_workspace_that_is_moved_is_the_same(catalog: Catalog, make, tmp_path: Path) -> None:
    catalog.commit([make.corpus(), make.part()], run="r")
    os.rename(tmp_path / "work", tmp_path / "moved")
    with Catalog.open(tmp_path / "moved") as moved:
        assert moved.workspace_id == catalog.workspace_id
        assert moved.commit([make.part(part=1)], run="r") == 2
        assert len(moved.parts("photos")) == 2
