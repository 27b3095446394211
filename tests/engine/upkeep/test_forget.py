"""`modmill forget` end to end: what is forgotten is nowhere, everything else is as it was."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import modmill
from engine.cli.entry import main
from engine.ingest import ingest
from engine.pipeline import config as pipeline
from engine.pipeline.config import CorpusConfig
from engine.run import job
from engine.upkeep import verify as verifying
from engine.upkeep.forget import retire
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError, WorkspaceError
from manifests.formats import rewrite, shards
from manifests.locked import locked
from manifests.log import entries as log
from manifests.log.actions import RunStarted
from manifests.modality import MODALITIES
from manifests.queries import retention
from manifests.recipe import sha256_hex
from manifests.recover.recover import recover
from manifests.snapshots import snapshot
from manifests.store.storage import cache_folder, open_storage

CAPTION = "a crossing at dawn that nobody else describes so"
PIPELINE = """
workspace: work
corpora:
  photos:
    source: photos
    crops: 2
    part_rows: 4
    modalities: [rgb, edges, boxes, palette, caption]
  notes:
    source: notes.jsonl
    kind: text
modalities:
  rgb: {keep: true}
  edges: {format: webdataset}
tokenizers:
  rgb: {steps: 2, batch: 4, codebook: 64, width: 16}
  edges: {steps: 2, batch: 4, codebook: 16, width: 16}
fit_rows: 8
engine: {runner: local, workers: 1, batch: 4}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_photos: Callable[..., Path]) -> Path:
    """A folder with a pipeline file, photographs (one of them no picture), notes, and the workspace made of them."""
    folder = tmp_path_factory.mktemp("forget")
    photos = make_photos(folder / "photos", 9)
    (photos / "photo004.txt").write_text(CAPTION)
    (photos / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.jsonl").write_text('{"text": "a red cube"}\n{"text": "a blue sphere on sand"}\n')
    (folder / "pipeline.yaml").write_text(PIPELINE)
    run(folder)
    with Catalog.open(folder / "work") as catalog:
        snapshot.make(catalog, "all", hold_out=0.3, run="test")
        snapshot.make(catalog, "notes", where="corpus = 'notes'", run="test")
        snapshot.make(catalog, "others", where=f"key <> '{key_of_name('photo004.jpg')}'", run="test")
    return folder


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it all, with a cache of its own."""
    monkeypatch.setenv("MODMILL_CACHE", str(tmp_path / "cache"))
    shutil.copytree(made, tmp_path / "home")
    return tmp_path / "home"


def run(home: Path, *overrides: str, **options: Any) -> job.Done:
    return job.run(pipeline.load(home / "pipeline.yaml", overrides), quiet=True, **options)


def command(*arguments: str | Path) -> int:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def forget(home: Path, *lines: str, options: tuple[str, ...] = ()) -> int:
    (home / "keys.txt").write_text("# those who asked\n\n" + "\n".join(lines) + "\n")
    return command("forget", home / "work", "--keys", home / "keys.txt", "--yes", *options)


def ask(home: Path, query: str, **options: Any) -> list[dict[str, Any]]:
    with Catalog.open(home / "work", **options) as catalog:
        return catalog.sql(query).to_pylist()


def key_of(home: Path, source: str) -> str:
    return ask(home, f"SELECT key FROM samples WHERE source = '{source}'")[0]["key"]


def key_of_name(source: str) -> str:
    """The key of a file of a folder."""
    return sha256_hex(source.encode())[:16]


def findings(home: Path) -> list[Any]:
    with Catalog.open(home / "work") as catalog:
        return verifying.verify(catalog).findings


def contents(home: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Of every live shard, the status and value of each row, by key."""
    found = {}
    with Catalog.open(home / "work") as catalog:
        for shard in catalog.live_shards():
            data = io.BytesIO(catalog.storage.read(shard.path))
            rows = shards.read_parquet(data) if shard.format == "parquet" else shards.read_tar(data)
            identity = (shard.corpus, shard.part, shard.modality, shard.form, shard.fingerprint, shard.crop)
            found[identity] = dict(zip(rows.keys, zip(rows.statuses, rows.values or [], strict=True), strict=True))
    return found


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def everything_in(data: bytes, name: str) -> bytes:
    """A file's bytes, and what is in it once it is unpacked."""
    if name.endswith(".parquet"):
        return data + repr(pq.ParquetFile(io.BytesIO(data)).read().to_pylist()).encode()
    if name.endswith(".arrow"):
        # The last 32 bytes of a cached table are the sha256 of the rest.
        return data + repr(pa.ipc.open_file(io.BytesIO(data[:-32])).read_all().to_pylist()).encode()
    return data


def test_one_photograph_goes_and_everything_else_stays(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, key = home / "work", key_of(home, "photo004.jpg")
    (before_version,) = ask(home, "SELECT max(version) AS version FROM timeline")
    before, files = contents(home), files_under(work / "data")
    # Caches hold it too: unpacked tokens, and the copies that locked SQL makes.
    with modmill.open(work) as workspace, workspace.loader("all", batch=4) as loader:
        for step in range(4):
            loader.batch_at(step)
    with Catalog.open(work) as catalog:
        assert locked.ask(catalog, "SELECT source FROM samples WHERE source = 'photo004.jpg'").num_rows == 1
        catalog.commit(
            [
                RunStarted(
                    run="tiny-1",
                    kind="train",
                    time="2026-11-24T10:00:00Z",
                    host="h",
                    commit=None,
                    versions={},
                    config={"snapshots": [{"uri": "x#all", "sha256": snapshot.read(catalog.storage, "all").sha256}]},
                )
            ],
            run="tiny-1",
        )
    own = {identity: rows[key] for identity, rows in before.items() if key in rows}
    assert list((cache_folder() / "tokens").glob("*.arrow"))
    secrets = [CAPTION.encode(), b"photo004.jpg"]
    secrets += [value for status, value in own.values() if status == 0 and isinstance(value, bytes)]
    secrets += [repr(value).encode() for status, value in own.values() if status == 0 and isinstance(value, list)]
    there = [
        everything_in(data, name) for name, data in [*files_under(work).items(), *files_under(cache_folder()).items()]
    ]
    assert len(secrets) > 6
    assert all(any(secret in data for data in there) for secret in secrets)

    assert forget(home, f"photos/{key}") == 0
    told = capsys.readouterr().out
    assert f"photos/{key}" in told
    assert "trained on all from 2026-11-24 10:00: its model saw them" in told
    assert "replaced by all-2" in told
    assert "--collect --yes" in told
    assert findings(home) == []
    # Everything of the row is null, and every other row has the very value it had.
    after = contents(home)
    assert after.keys() == before.keys()
    for identity, rows in before.items():
        expected = {other: (4, None) if other == key else found for other, found in rows.items()}
        assert after[identity] == expected, identity
    part = ask(home, f"SELECT part FROM samples WHERE key = '{key}'")[0]["part"]
    assert ask(home, f"SELECT * EXCLUDE (corpus, part, row) FROM samples WHERE key = '{key}'") == [
        {"key": key, "source": None, "size_bytes": None, "sha256": None, "caption": None}
    ]
    # Parts and corpora that do not hold it have the files they had, and no more.
    others = {name: data for name, data in files.items() if f"part-{part:07d}" not in name or "notes" in name}
    now = files_under(work / "data")
    assert {name: now[name] for name in others} == others
    assert all(f"part-{part:07d}" in name for name in now.keys() - files.keys())
    counts = ask(
        home, "SELECT rows = ok + failed + absent + not_selected + forgotten AS adds_up, forgotten, part FROM shards"
    )
    assert all(row["adds_up"] and row["forgotten"] == (row["part"] == part) for row in counts if row["part"] or part)
    assert [row["key"] for row in ask(home, "SELECT * FROM forgotten")] == [key]

    # Listing what would go deletes nothing; then it goes, and nothing of it is left anywhere.
    as_it_is = files_under(work)
    assert command("forget", work, "--collect", "--retention", "3650") == 0
    assert "nothing is deleted yet" in capsys.readouterr().out
    assert files_under(work) == as_it_is
    assert command("forget", work, "--collect", "--retention", "3650", "--yes") == 0
    assert "holds rows that are forgotten" in capsys.readouterr().out
    assert findings(home) == []
    gone = as_it_is.keys() - files_under(work).keys()
    assert gone
    assert all("part-" in name and f"part-{part:07d}" in name for name in gone)
    # The keys file is the user's own, and so are the photographs.
    for folder in (work, cache_folder()):
        for name, data in files_under(folder).items():
            found = everything_in(data, name)
            assert not [secret for secret in secrets if secret in found], name
    assert contents(home) == after
    with pytest.raises(Exception, match=r"forget --collect"):
        ask(home, "SELECT count(*) FROM samples", as_of=before_version["version"])


def test_snapshots_get_a_successor_that_loads(home: Path) -> None:
    work = home / "work"
    with Catalog.open(work) as catalog:
        before = {name: snapshot.read(catalog.storage, name) for name in ("all", "others")}
    key = key_of(home, "photo004.jpg")
    row = ask(home, f"SELECT corpus, part, row FROM samples WHERE key = '{key}'")[0]
    assert forget(home, f"photos/{key}") == 0
    for name, lost in (("all", 1), ("others", 0)):
        with pytest.raises(
            WorkspaceError, match=f"'{name}' .* was replaced by '{name}-2' after {lost} rows were forgotten"
        ):
            snapshot.open_snapshot(f"{work}#{name}")
        after = snapshot.open_snapshot(f"{work}#{name}-2")
        assert after.rows == before[name].rows - lost
        for old, new in zip(before[name].parts, after.parts, strict=True):
            expected = old.selected.copy()
            if (old.corpus, old.part) == (row["corpus"], row["part"]):
                expected[row["row"]] = False
            assert (new.selected == expected).all()
            assert (new.held_out == (old.held_out & expected)).all()
    # One whose files hold nothing of it stays.
    assert snapshot.open_snapshot(f"{work}#notes").rows == 2
    listed = ask(home, "SELECT snapshot, replaces, replaced_by FROM snapshots ORDER BY snapshot")
    assert [tuple(each.values()) for each in listed] == [
        ("all", None, "all-2"),
        ("all-2", "all", None),
        ("notes", None, None),
        ("others", None, "others-2"),
        ("others-2", "others", None),
    ]
    assert command("forget", work, "--collect", "--yes") == 0
    with modmill.open(work) as workspace:
        with workspace.loader("all-2", batch=3) as loader:
            assert len(loader.batch_at(0)) == 3
            epoch = [loader.batch_at(step) for step in range(20)]
        seen = {
            (batch.corpora[c], p, r)
            for batch in epoch
            for c, p, r in zip(batch.corpus, batch.parts, batch.rows, strict=True)
        }
        assert ("photos", row["part"], row["row"]) not in seen
        with pytest.raises(WorkspaceError, match="use 'all-2'"):
            workspace.loader("all", batch=3)
    # A second forget goes on from there.
    assert forget(home, f"photos/{key_of(home, 'photo007.jpg')}") == 0
    assert snapshot.open_snapshot(f"{work}#all-3").rows == before["all"].rows - 2
    assert findings(home) == []
    # A pipeline file that made the first snapshot finds its last successor.
    sections = home / "pipeline.yaml"
    sections.write_text(sections.read_text() + "snapshots: {all: {hold_out: 0.3}}\n")
    assert run(home).did_nothing


def test_the_same_bytes_are_never_taken_in_again(home: Path) -> None:
    photos = home / "photos"
    key = key_of(home, "photo002.jpg")
    assert forget(home, f"photos/{key}") == 0
    shutil.copy(photos / "photo002.jpg", photos / "again.jpg")
    (photos / "new.jpg").write_bytes((photos / "photo002.jpg").read_bytes() + b" ")
    done = run(home, "corpora.photos.modalities=[rgb, edges, boxes, palette, caption, metadata]")
    assert done.counts["new_samples"] == 1
    assert ask(home, "SELECT vanished, changed FROM corpora WHERE corpus = 'photos'") == [{"vanished": 0, "changed": 0}]
    sources = {row["source"] for row in ask(home, "SELECT source FROM samples WHERE corpus = 'photos'")}
    assert "new.jpg" in sources
    assert not sources & {"again.jpg", "photo002.jpg"}
    (photos / "photo002.jpg").write_bytes(b"another picture")
    # Work that came later counts the row as forgotten too.
    late = ask(home, "SELECT sum(forgotten) AS forgotten FROM shards WHERE modality = 'metadata' GROUP BY form")
    assert [row["forgotten"] for row in late] == [1, 1]
    assert findings(home) == []
    assert run(home, "corpora.photos.modalities=[rgb, edges, boxes, palette, caption, metadata]").did_nothing
    (photos / "photo002.jpg").unlink()
    assert run(home, "corpora.photos.modalities=[rgb, edges, boxes, palette, caption, metadata]").did_nothing
    assert ask(home, "SELECT vanished, changed FROM corpora WHERE corpus = 'photos'") == [{"vanished": 0, "changed": 0}]


def test_a_rewritten_shard_is_the_one_that_a_worker_writes(home: Path) -> None:
    broken = ask(home, "SELECT part FROM samples WHERE source = 'broken.jpg'")[0]["part"]
    key = ask(home, f"SELECT key FROM samples WHERE corpus = 'photos' AND part = {broken} AND source <> 'broken.jpg'")[
        0
    ]["key"]
    assert forget(home, f"photos/{key}") == 0
    query = f"SELECT path, failed_path FROM shards WHERE corpus = 'photos' AND part = {broken} ORDER BY path"
    rewritten = ask(home, query)
    (home / "pipeline.yaml").write_text(PIPELINE)
    run(home, retry=())
    assert ask(home, query) == rewritten
    assert any(row["failed_path"] for row in rewritten)
    assert findings(home) == []


def test_a_failed_row_goes_from_the_failed_files(home: Path) -> None:
    assert ask(home, "SELECT DISTINCT key, message FROM failures")
    assert forget(home, "broken.jpg") == 0
    assert ask(home, "SELECT * FROM failures") == []
    assert ask(home, "SELECT sum(failed) AS failed, sum(forgotten) > 0 AS is_forgotten FROM shards") == [
        {"failed": 0, "is_forgotten": True}
    ]
    assert findings(home) == []
    assert command("forget", home / "work", "--collect", "--yes") == 0
    assert not list((home / "work/data").rglob("*.failed.parquet"))
    assert not [name for name, data in files_under(home / "work").items() if b"broken.jpg" in everything_in(data, name)]


def test_documents_and_all_ways_to_name_a_sample(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twin = home / "photos/twin.jpg"
    shutil.copy(home / "photos/photo005.jpg", twin)
    run(home)
    by_bytes = sha256_hex((home / "photos/photo001.jpg").read_bytes())
    assert (
        forget(home, "notes.jsonl#1", by_bytes.upper(), "photo005.jpg", "photos/nobody", "https://example.org/x.jpg")
        == 2
    )
    told = capsys.readouterr().err
    assert "2 of 5 lines name no sample" in told
    assert "photos/nobody\n  https://example.org/x.jpg" in told
    assert ask(home, "SELECT * FROM forgotten") == []
    lines = ("notes.jsonl#1", by_bytes.upper(), "photo005.jpg", "photos/nobody")
    assert forget(home, *lines, options=("--ignore-unknown",)) == 0
    # The twin has the same bytes, so it goes as well.
    assert ask(home, "SELECT corpus, count(*) AS n FROM forgotten GROUP BY 1 ORDER BY 1") == [
        {"corpus": "notes", "n": 1},
        {"corpus": "photos", "n": 3},
    ]
    left = {row["source"] for row in ask(home, "SELECT source FROM samples")}
    assert not left & {"notes.jsonl#1", "photo001.jpg", "photo005.jpg", "twin.jpg"}
    assert findings(home) == []
    # Names that are gone are known from before; nothing is left to do, and nothing changes.
    shards_before = ask(home, "SELECT path FROM shards ORDER BY path")
    assert forget(home, *lines[:3]) == 0
    assert ask(home, "SELECT path FROM shards ORDER BY path") == shards_before
    receipts = sorted((home / "work/_meta/receipts").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    first, second = (json.loads(path.read_text()) for path in receipts)
    assert {row["key"] for row in first["rows"]} == {row["key"] for row in second["rows"]} | {key_of_name("twin.jpg")}
    assert first["files_left"] > 0
    for receipt in receipts:
        assert b"photo00" not in receipt.read_bytes()


def ingested(tmp_path: Path, **corpora: dict[str, str]) -> Path:
    """A folder with a workspace of documents; each corpus leaves out what any corpus before it has."""
    storage = open_storage(tmp_path / "work")
    log.create_workspace(storage)
    with Catalog(storage) as catalog:
        for corpus, texts in corpora.items():
            (tmp_path / corpus).mkdir()
            for name, text in texts.items():
                (tmp_path / corpus / name).write_text(text)
            ingest_again(tmp_path, catalog, corpus)
    return tmp_path


def ingest_again(home: Path, catalog: Catalog, corpus: str) -> ingest.Ingested:
    asked = {"source": str(home / corpus), "kind": "text", "filter": {"duplicates": "across"}}
    return ingest.ingest(catalog, corpus, CorpusConfig.model_validate(asked), run="r")


def test_a_duplicate_that_a_filter_left_out_is_known_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = {"first.txt": "one", "second.txt": "two", "secret.txt": "one", "twice.txt": "two"}
    home = ingested(tmp_path, docs=first, more={"hidden.txt": "one", "third.txt": "three"})
    secrets = [name for source in ("secret.txt", "hidden.txt") for name in (source, key_of_name(source))]
    secrets.append(sha256_hex(b"one"))
    as_it_is = files_under(home / "work")
    listed = ask(home, "SELECT source FROM dropped ORDER BY source")
    assert [row["source"] for row in listed] == ["hidden.txt", "secret.txt", "twice.txt"]

    # Listing what would go changes nothing, and says all of it.
    (home / "keys.txt").write_text("secret.txt\n")
    assert command("forget", home / "work", "--keys", home / "keys.txt") == 0
    told = capsys.readouterr().out
    assert all(name in told for name in ("first.txt", "secret.txt", "hidden.txt"))
    assert not any(name in told for name in ("second.txt", "twice.txt", "third.txt"))
    assert "nothing is forgotten yet; --yes takes out these 1 samples and 2 rows" in told
    assert files_under(home / "work") == as_it_is

    assert forget(home, "secret.txt") == 0
    assert ask(home, "SELECT corpus, key FROM forgotten") == [{"corpus": "docs", "key": key_of_name("first.txt")}]
    assert ask(home, "SELECT source FROM dropped") == [{"source": "twice.txt"}]
    assert findings(home) == []
    # The same command knows that it is done, and the files alone tell the same as the log.
    assert forget(home, "secret.txt") == 0
    copy = shutil.copytree(home / "work", tmp_path / "copy/work")
    shutil.rmtree(copy / "_meta/log")
    recover(open_storage(copy))
    for place in (home, copy.parent):
        assert command("forget", place / "work", "--collect", "--yes") == 0
        assert ask(place, "SELECT source FROM dropped") == [{"source": "twice.txt"}]
        lists = list((place / "work").rglob("dropped-*.parquet"))
        assert len(lists) == 2
        held = [everything_in(path.read_bytes(), path.name) for path in lists]
        assert not [name for name in secrets if any(name.encode() in data for data in held)]
        names = [everything_in(data, name) for name, data in files_under(place / "work").items()]
        # The log keeps 16 digits of the sha256 of the line that named it, which is a key of a file of a folder too.
        assert not [name for name in secrets if name.endswith(".txt") and any(name.encode() in data for data in names)]
        assert findings(place) == []
    # They are still at their source, and stay out of everything.
    with Catalog.open(home / "work") as catalog:
        for corpus in ("docs", "more"):
            again = ingest_again(home, catalog, corpus)
            assert (again.new, again.dropped) == (0, 0)
    assert ask(home, "SELECT source FROM dropped") == [{"source": "twice.txt"}]


def test_a_collection_clears_what_an_older_forget_left_in_dropped(tmp_path: Path) -> None:
    home = ingested(tmp_path, docs={"first.txt": "one", "secret.txt": "one"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.upkeep.dropped.take_out", lambda *_: None)
        assert forget(home, "first.txt") == 0
    assert ask(home, "SELECT source FROM dropped") == [{"source": "secret.txt"}]
    assert command("forget", home / "work", "--collect", "--yes") == 0
    assert ask(home, "SELECT source FROM dropped") == []
    assert len(list((home / "work").rglob("dropped-*.parquet"))) == 1
    assert findings(home) == []


def test_what_asks_for_nothing_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = home / "work"
    (home / "empty.txt").write_text("# nobody\n\n")
    assert command("forget", work, "--keys", home / "empty.txt") == 2
    assert "names nothing" in capsys.readouterr().err
    assert command("forget", work) == 2
    assert command("forget", work, "--collect", "--keys", home / "empty.txt") == 2
    assert command("forget", work, "--recipe", "ab", "--yes") == 2
    assert forget(home, "photos/nobody", options=("--ignore-unknown", "--format", "json")) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == []
    assert "no line names a sample" in captured.err


@pytest.mark.parametrize("entries", [2, 4])
def test_a_killed_forget_is_finished_by_the_same_command(home: Path, entries: int) -> None:
    """Killed as soon as so many entries stand in the log: between parts, and before or after snapshots."""
    parts = ask(
        home, "SELECT part, min(source) AS source FROM samples WHERE source LIKE 'photo00%' GROUP BY 1 ORDER BY 1"
    )
    assert len(parts) == 3
    (home / "keys.txt").write_text("\n".join(row["source"] for row in parts))
    log = home / "work/_meta/log"
    before = len(list(log.glob("*.json")))
    program = "import sys; from engine.cli.entry import main; main(sys.argv[1:])"
    arguments = [sys.executable, "-c", program, "forget", home / "work", "--keys", home / "keys.txt", "--yes"]
    process = subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[3]
    )
    until = time.monotonic() + 60
    while len(list(log.glob("*.json"))) < before + entries and process.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert findings(home) == []
    assert forget(home, *(row["source"] for row in parts)) == 0
    assert ask(home, "SELECT count(*) AS n FROM forgotten") == [{"n": 3}]
    assert ask(home, "SELECT sum(forgotten) AS n FROM shards WHERE modality = 'palette' GROUP BY form") == [
        {"n": 3},
        {"n": 3},
    ]
    assert findings(home) == []
    assert snapshot.open_snapshot(f"{home / 'work'}#all-2").rows == 8
    receipt = max((home / "work/_meta/receipts").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    assert len(json.loads(receipt.read_text())["rows"]) == 3
    assert command("forget", home / "work", "--collect", "--yes") == 0
    assert findings(home) == []


def test_recipes_that_are_superseded_are_retired(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = home / "work"
    old = ask(home, "SELECT DISTINCT recipe FROM shards WHERE modality = 'palette' AND form = 'label'")[0]["recipe"]
    assert command("forget", work, "--recipe", old) == 2
    assert "is the current recipe of palette in photos" in capsys.readouterr().err
    assert command("forget", work, "--modality", "palette") == 2
    assert "nothing to retire" in capsys.readouterr().err
    assert command("forget", work, "--modality", "pallete") == 2
    assert "did you mean 'palette'" in capsys.readouterr().err
    run(home, "modalities.palette.parameters.colors=3")
    assert command("forget", work, "--modality", "palette", "--corpus", "photos", "--format", "json") == 0
    retired = json.loads(capsys.readouterr().out)
    assert {(row["form"], row["shards"]) for row in retired} == {("label", 3), ("token", 3)}
    assert {row["recipe"] for row in ask(home, "SELECT recipe FROM shards WHERE NOT is_current")} == set()
    assert findings(home) == []
    # Snapshots still name the old tokens, so a collection leaves those, and takes the labels.
    assert command("forget", work, "--collect", "--retention", "0", "--yes") == 0
    kinds = {name.partition("-")[0].split("/")[2] for name in files_under(work / "data") if old in name}
    assert kinds == set()
    assert findings(home) == []
    # A row of a retired shard that a snapshot has is forgotten in a file that only the successor names.
    assert forget(home, "photo004.jpg") == 0
    token = next(row["fingerprint"] for row in retired if row["form"] == "token")
    successor = snapshot.open_snapshot(f"{work}#all-2")
    own = [shard for shard in successor.shards if shard.fingerprint == token]
    assert len(own) == 3
    assert command("forget", work, "--collect", "--retention", "0", "--yes") == 0
    assert findings(home) == []
    assert all((work / shard.path).exists() for shard in own)


@pytest.mark.parametrize("kind", ["label", "vector", "token", "tar"])
def test_every_format_is_rewritten_like_a_fresh_one(kind: str) -> None:
    """The bytes are those of a shard that was written with the row forgotten from the start."""
    keys, facts = ["a", "b", "c"], {"corpus": "photos", "part": 0}

    def written(statuses: list[int], values: list[Any]) -> bytes:
        if kind == "token":
            return shards.write_tokens(keys, statuses, values, 1000, facts)
        if kind == "tar":
            writer = shards.TarWriter("png")
            for key, status, value in zip(keys, statuses, values, strict=True):
                writer.add(key, status, value)
            with writer.finish() as file:
                return file.read()
        modality = MODALITIES["caption" if kind == "label" else "clip_global"]
        return shards.write_labels(keys, statuses, values, modality, facts)

    width = 512 if kind == "vector" else 3
    rows: dict[str, list[Any]] = {
        "label": ["one", None, "three"],
        "vector": [[float(value) for value in range(width)], None, [0.5] * width],
        "token": [[1, 2, 3], None, [4, 5]],
        "tar": [b"first", None, b"third"],
    }
    values = rows[kind]
    found = rewrite.without_rows(written([0, 1, 0], values), "webdataset" if kind == "tar" else "parquet", {2})
    assert found.data == written([0, 1, 4], [values[0], None, None])
    assert found.statuses == [0, 1, 4]
    assert found.tokens == (3 if kind == "token" else 0)


def test_forget_in_a_bucket(s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODMILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "notes.jsonl").write_text("".join(f'{{"text": "note {n} of the harbour"}}\n' for n in range(5)))
    (tmp_path / "pipeline.yaml").write_text(
        f"workspace: {s3_bucket}/forget\ncorpora: {{notes: {{source: notes.jsonl, kind: text, part_rows: 2}}}}\n"
        "engine: {runner: local, workers: 1}\n"
    )
    run(tmp_path)
    uri = f"{s3_bucket}/forget"
    with Catalog.open(uri) as catalog:
        snapshot.make(catalog, "all", hold_out=0.0, run="test")
    (tmp_path / "keys.txt").write_text("notes.jsonl#3\n")
    assert command("forget", uri, "--keys", tmp_path / "keys.txt", "--yes") == 0
    assert command("forget", uri, "--collect", "--yes") == 0
    with Catalog.open(uri) as catalog:
        assert verifying.verify(catalog).findings == []
        assert [row.key for row in retention.find_rows(catalog, ["notes.jsonl#3"]).get("notes.jsonl#3", [])] == []
    storage = open_storage(uri)
    for file in storage.walk(""):
        assert b"note 3 of the harbour" not in everything_in(storage.read(file.path), file.path), file.path
    assert snapshot.open_snapshot(f"{uri}#all-2").rows == 4
    with pytest.raises(ConfigError, match="nothing to retire"):
        retire(uri, recipe=None, modality="text", corpus=None)
