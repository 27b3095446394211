"""The private index: whatever happens to its file, and however the log came in, the answers are the log's."""

import json
import os
import random
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manifests.catalog.catalog import Catalog
from manifests.log import actions
from manifests.log import entries as log
from manifests.modality import Form
from manifests.store import paths
from manifests.store.storage import Storage, open_storage

ROOT = Path(__file__).parents[3]
# Views that need no file but the log.
VIEWS = ("corpora", "parts", "shards", "recipes", "coverage", "runs", "tokenizers", "lineage", "timeline")
FINGERPRINTS = ["a1" * 32, "b2" * 32]

# -- a replay from scratch equals the incremental index ---------------------------------------------------------------


@st.composite
def commits(draw: st.DrawFn) -> list[list[actions.Action]]:
    """What a log may hold: corpora that grow, recipes that change and change back, shards that replace each other."""
    corpora = st.sampled_from(["photos", "texts"])
    kinds: list[tuple[str, Form]] = [("rgb", "token"), ("caption", "label")]
    modalities = st.sampled_from(kinds)
    fingerprints = st.sampled_from(FINGERPRINTS)
    parts: dict[str, int] = {"photos": 0, "texts": 0}
    runs = 0

    def action() -> actions.Action:
        nonlocal runs
        corpus = draw(corpora)
        modality, form = draw(modalities)
        crop_grain = modality == "rgb"
        match draw(st.sampled_from(["part", "current", "current", *["shard"] * 4, "corpus", "recipe", "run", "other"])):
            case "part":
                parts[corpus] += 1
                return actions.PartAdded(
                    corpus=corpus,
                    part=parts[corpus] - 1,
                    rows=draw(st.integers(1, 9)),
                    path=paths.samples(corpus, parts[corpus] - 1, "01" * 32),
                    sha256="01" * 32,
                    size_bytes=1,
                    keys_sha256="02" * 32,
                    source_bytes=draw(st.integers(0, 2**40)),
                )
            case "current":
                crops = draw(st.integers(1, 3)) if crop_grain else None
                return actions.RecipeCurrent(
                    corpus=corpus, modality=modality, form=form, fingerprint=draw(fingerprints), crops=crops
                )
            case "shard":
                failed = draw(st.integers(0, 2))
                return actions.ShardAdded(
                    corpus=corpus,
                    part=draw(st.integers(0, 1)),
                    crop=draw(st.integers(0, 1)) if crop_grain else None,
                    modality=modality,
                    form=form,
                    fingerprint=draw(fingerprints),
                    path=paths.shard(
                        corpus, modality, "ab" * 32, draw(st.integers(0, 99)), None, "03" * 32, is_tar=False
                    ),
                    format="parquet",
                    sha256=secrets.token_hex(32),
                    size_bytes=draw(st.integers(1, 1000)),
                    rows=9,
                    ok=9 - failed,
                    failed=failed,
                    absent=0,
                    keys_sha256="02" * 32,
                    tokens=draw(st.integers(0, 500)) if form == "token" else None,
                )
            case "corpus":
                return actions.CorpusAdded(
                    corpus=corpus, kind="image", source=draw(st.text()), seed=1, part_rows=9, config={"a": [1, None]}
                )
            case "recipe":
                document = {"modality": modality, "form": form, "producer": "x", "version": 1, "weights": None}
                document |= {"parameters": {}, "crop": None, "inputs": {"rgb": draw(fingerprints)}}
                return actions.RecipeAdded(fingerprint=draw(fingerprints), document=document)
            case "run":
                runs += 1
                return actions.RunStarted(
                    run=f"r{runs}", kind="run", time=log.now(), host="h", commit=None, versions={}, config={}
                )
        if draw(st.booleans()):
            return actions.SourcesChanged(
                corpus=corpus, path=paths.changes(corpus, "03" * 32), vanished=draw(st.integers(0, 9)), changed=1
            )
        return actions.TokenizerAdded(
            name=draw(st.sampled_from(["text", "grid"])),
            digest=secrets.token_hex(32),
            path=paths.tokenizer("text", "cc" * 32),
            family="text",
            family_version=1,
            vocabulary=100,
            options={},
            rows=3,
            metrics={"loss": draw(st.floats(0, 1))},
        )

    return [[action() for _ in range(draw(st.integers(1, 6)))] for _ in range(draw(st.integers(1, 8)))]


def expected_coverage(history: list[list[actions.Action]]) -> list[dict[str, Any]]:
    """The view `coverage`, worked out the slow way."""
    current: dict[tuple[str, str, str], actions.RecipeCurrent] = {}
    live: dict[tuple[Any, ...], actions.ShardAdded] = {}
    rows: dict[str, list[int]] = {}
    for action in (action for commit in history for action in commit):
        if isinstance(action, actions.RecipeCurrent):
            current[action.corpus, action.modality, action.form] = action
        elif isinstance(action, actions.PartAdded):
            rows.setdefault(action.corpus, []).append(action.rows)
        elif isinstance(action, actions.ShardAdded):
            identity = (action.corpus, action.part, action.crop, action.modality, action.form, action.fingerprint)
            live[identity] = action
    covered = []
    for (corpus, modality, form), recipe in sorted(current.items()):
        if corpus not in rows:
            continue
        crops = 1 if recipe.crops is None else recipe.crops
        of_recipe = [
            shard
            for shard in live.values()
            if (shard.corpus, shard.modality, shard.form, shard.fingerprint)
            == (corpus, modality, form, recipe.fingerprint)
            and (shard.crop or 0) < crops
        ]
        by_part: dict[int, list[actions.ShardAdded]] = {}
        for shard in of_recipe:
            by_part.setdefault(shard.part, []).append(shard)
        done = sum(len(found) == crops for found in by_part.values())
        covered.append(
            {
                "corpus": corpus,
                "modality": modality,
                "form": form,
                "recipe": recipe.fingerprint[:12],
                "crops": recipe.crops,
                "parts": len(rows[corpus]),
                "parts_done": done,
                "parts_missing": len(rows[corpus]) - done,
                "parts_with_failures": sum(any(shard.failed for shard in found) for found in by_part.values()),
                "rows": sum(rows[corpus]) * crops,
                "ok": sum(shard.ok for shard in of_recipe),
                "failed": sum(shard.failed for shard in of_recipe),
                "absent": 0,
                "not_selected_or_forgotten": 0,
                "tokens": sum(shard.tokens or 0 for shard in of_recipe),
                "size_bytes": sum(shard.size_bytes for shard in of_recipe),
            }
        )
    return covered


@given(history=commits())
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_a_replay_equals_the_incremental_index(history: list[list[actions.Action]], answers) -> None:
    storage = open_storage(f"memory://{secrets.token_hex(8)}")
    log.create_workspace(storage)
    with Catalog(storage) as incremental, Catalog(storage) as lagging:
        for number, commit in enumerate(history, start=1):
            assert incremental.commit(commit, run=f"r{number}") == number
            if number == len(history) // 2:
                lagging.refresh()
        lagging.refresh()
        with Catalog(storage) as replayed:
            replaced = ("log.shard", "log.current", "log.tokenizer")
            expected = answers(incremental, (*VIEWS, *replaced))
            assert answers(replayed, (*VIEWS, *replaced)) == expected
            assert answers(lagging, replaced) == {table: expected[table] for table in replaced}
            assert replayed.live_shards() == incremental.live_shards()
            assert replayed.parts("photos") == incremental.parts("photos")
            assert replayed.tokenizers() == incremental.tokenizers()
            assert replayed.current_recipes("texts") == incremental.current_recipes("texts")
        assert incremental.coverage() == expected_coverage(history)
        added = [action for commit in history for action in commit if isinstance(action, actions.ShardAdded)]
        assert set(incremental.live_shards()) <= set(added)
        assert {part for part in incremental.parts("photos")} == {
            action
            for commit in history
            for action in commit
            if isinstance(action, actions.PartAdded) and action.corpus == "photos"
        }


# -- the file ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, make, answers) -> tuple[Path, dict[str, Any]]:
    """A folder with a workspace and the cache that holds its index, and what its views say."""
    folder = tmp_path_factory.mktemp("template")
    storage = open_storage(folder / "work")
    log.create_workspace(storage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODMILL_CACHE", str(folder / "cache"))
        with Catalog(storage) as catalog:
            catalog.commit([make.run_started(), make.corpus(), make.current()], run="r1")
            for part in range(0, 40, 4):
                new = [(make.part(part=part + i), make.shard(part=part + i, ok=3, failed=1)) for i in range(4)]
                catalog.commit([action for both in new for action in both], run="r1")
            return folder, answers(catalog, VIEWS)


@pytest.fixture
def filled(template, tmp_path: Path, cache: Path) -> tuple[Storage, dict[str, Any]]:
    """A workspace of 40 parts with an index in the cache, and what its views say."""
    folder, expected = template
    shutil.copytree(folder / "work", tmp_path / "work")
    shutil.copytree(folder / "cache", cache)
    return open_storage(tmp_path / "work"), expected


def index_of(storage: Storage, cache: Path) -> Path:
    """The one index file of a workspace."""
    (found,) = (cache / log.workspace_id(storage)).glob("index-*.duckdb")
    return found


def tables_in(path: Path) -> int:
    """Parts in an index file, by plain DuckDB."""
    with duckdb.connect(str(path), read_only=True) as connection:
        return connection.execute("SELECT count(*) FROM log.part").fetchall()[0][0]


def test_the_index_is_kept_between_openings(filled, cache: Path, answers) -> None:
    storage, expected = filled
    path = index_of(storage, cache)
    before = path.stat().st_ino
    assert tables_in(path) == 40
    with Catalog(storage) as catalog:
        assert answers(catalog, VIEWS) == expected
    assert path.stat().st_ino == before


def other_index(path: Path) -> None:
    """Puts the index of another, longer log in its place."""
    storage = open_storage(path.parent / "other")
    log.create_workspace(storage)
    with Catalog(storage) as catalog:
        for run in range(12):
            catalog.commit([actions.RunEnded(run=f"other-{run}", time=log.now(), status="done")], run="other")
        found = path.parents[1] / catalog.workspace_id / "index-0.duckdb"
    shutil.copy(found, path)


def foreign_file(path: Path) -> None:
    """Puts a DuckDB file of someone else in its place."""
    path.unlink()
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE SCHEMA log; CREATE TABLE log.applied (a INTEGER)")


def older_tables(path: Path) -> None:
    """Makes it an index of other tables."""
    with duckdb.connect(str(path)) as connection:
        connection.execute("UPDATE log.made_by SET value = 'an older schema.sql'; DROP TABLE log.tokenizer CASCADE")


def newer_than_the_log(path: Path) -> None:
    """Makes it claim a version that the log does not have."""
    with duckdb.connect(str(path)) as connection:
        connection.execute("UPDATE log.applied SET version = version + 1000")


def stale_wal(path: Path) -> None:
    path.with_name(path.name + ".wal").write_bytes(b"no write-ahead log of DuckDB" * 40)


DAMAGES = {
    "deleted": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "one byte": lambda path: path.write_bytes(b"x"),
    "cut in the header": lambda path: os.truncate(path, 5000),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "cut at the end": lambda path: os.truncate(path, path.stat().st_size - 100_000),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "text": lambda path: path.write_text("not a database" * 1000),
    "of another log": other_index,
    "of someone else": foreign_file,
    "of other tables": older_tables,
    "newer than the log": newer_than_the_log,
    "with a strange WAL": stale_wal,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_index_is_made_anew(filled, damage, cache: Path, answers) -> None:
    storage, expected = filled
    path = index_of(storage, cache)
    damage(path)
    with Catalog(storage) as catalog:
        assert answers(catalog, VIEWS) == expected
    # It is a good file again, not an index in memory.
    assert tables_in(path) == 40


def test_an_index_with_a_flipped_bit_anywhere_is_made_anew(filled, cache: Path, answers, make) -> None:
    storage, expected = filled
    path = index_of(storage, cache)
    good = path.read_bytes()
    chosen = random.Random(0)
    # Bytes of the headers, and one that is used of every block: DuckDB looks at a block when a query needs it.
    blocks = [range(start, min(start + 262_144, len(good))) for start in range(3 * 4096, len(good), 262_144)]
    used = [[place for place in block if good[place]] for block in blocks]
    for place in [0, 8, 4096, *(chosen.choice(places) for places in used if places)]:
        broken = bytearray(good)
        broken[place] ^= 1 << chosen.randrange(8)
        path.write_bytes(broken)
        with Catalog(storage) as catalog:
            assert answers(catalog, VIEWS) == expected, place
            assert len(catalog.parts("photos")) == 40
        assert tables_in(path) == 40


def test_a_commit_over_a_torn_index_is_not_lost(filled, cache: Path, make) -> None:
    storage, _ = filled
    path = index_of(storage, cache)
    good = path.read_bytes()
    places = [place for place, byte in enumerate(good) if byte]
    for number, place in enumerate(random.Random(1).sample(places, 4)):
        broken = bytearray(good)
        broken[place] ^= 1
        path.write_bytes(broken)
        with Catalog(storage) as catalog:
            catalog.commit([make.part(part=40 + number)], run="r2")
            catalog.commit([make.shard(part=40 + number)], run="r2")
            assert [part.part for part in catalog.parts("photos")] == list(range(41 + number))
            assert len(catalog.live_shards()) == 41 + number


COMMITS_AND_DIES = """
import os, sys
from manifests.log import actions, entries as log
from manifests.catalog.catalog import Catalog
catalog = Catalog.open(sys.argv[1])
for run in range(20):
    catalog.commit([actions.RunEnded(run=f"died-{run}", time=log.now(), status="done")], run="died")
    catalog.corpora()  # takes the entry into the index
os._exit(9)
"""


def test_an_index_whose_process_died_is_taken_up_whatever_its_wal(filled, cache: Path) -> None:
    storage, _ = filled
    path = index_of(storage, cache)
    assert subprocess.run([sys.executable, "-c", COMMITS_AND_DIES, storage.uri], cwd=ROOT).returncode == 9
    wal_path = path.with_name(path.name + ".wal")
    good, wal = path.read_bytes(), wal_path.read_bytes()
    flipped = bytearray(wal)
    flipped[len(wal) // 2] ^= 1
    for left in (wal, wal[: len(wal) // 2], wal[:-1], bytes(flipped), b"", None):
        path.write_bytes(good)
        wal_path.unlink(missing_ok=True)
        if left is not None:
            wal_path.write_bytes(left)
        with Catalog(storage) as catalog:
            assert catalog.version == 31
            ended = catalog.sql("SELECT count(*) AS n FROM log.run_ended").to_pylist()
            assert ended == [{"n": 20}]


# -- the cache --------------------------------------------------------------------------------------------------------

OPENS = """
import sys
from manifests.catalog.catalog import Catalog
with Catalog.open(sys.argv[1]) as catalog:
    print(catalog.version, flush=True)
    sys.stdin.readline()
    print(catalog.refresh(), len(catalog.parts("photos")), flush=True)
"""


def test_processes_that_read_at_the_same_time_have_files_of_their_own(filled, cache: Path, make) -> None:
    storage, _ = filled
    folder = cache / log.workspace_id(storage)
    with (
        Catalog(storage) as ours,
        subprocess.Popen(
            [sys.executable, "-c", OPENS, storage.uri], stdin=-1, stdout=-1, text=True, cwd=ROOT
        ) as theirs,
    ):
        assert theirs.stdout is not None
        assert theirs.stdout.readline() == "11\n"
        assert sorted(path.name for path in folder.glob("*.duckdb")) == ["index-0.duckdb", "index-1.duckdb"]
        ours.commit([make.part(part=40)], run="r2")
        answer, _ = theirs.communicate("\n")
        assert answer == "12 41\n"
    with Catalog(storage), Catalog(storage):
        assert len(list(folder.glob("*.duckdb"))) == 2


@pytest.mark.parametrize("why", ["no folder can be made", "a folder has the file's name"])
def test_without_a_cache_the_index_is_in_memory(
    filled, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers, make
) -> None:
    storage, expected = filled
    broken = tmp_path / "broken"
    if why == "no folder can be made":
        broken.write_text("a file")
    else:
        (broken / log.workspace_id(storage) / "index-0.duckdb").mkdir(parents=True)
    monkeypatch.setenv("MODMILL_CACHE", str(broken))
    with Catalog(storage) as catalog:
        assert answers(catalog, VIEWS) == expected
        catalog.commit([make.part(part=40)], run="r2")
        assert len(catalog.parts("photos")) == 41
    if broken.is_file():
        assert broken.read_text() == "a file"


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from manifests.store.storage import cache_folder

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("MODMILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "modmill"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == tmp_path / "home" / ".cache" / "modmill"


def test_an_index_that_cannot_be_brought_up_lets_go_of_its_file(filled, cache: Path) -> None:
    storage, _ = filled
    newest = Path(storage.full(paths.log_entry(11)))
    whole = newest.read_bytes()
    document = json.loads(whole)
    newest.write_bytes(b"{")
    for _ in range(3):
        with pytest.raises(Exception, match=r"11\.json cannot be read"):
            Catalog(storage)
    newest.write_bytes(whole)
    with Catalog(storage) as catalog:
        assert catalog.version == document["version"] == 11
    assert [path.name for path in (cache / catalog.workspace_id).glob("*.duckdb")] == ["index-0.duckdb"]
