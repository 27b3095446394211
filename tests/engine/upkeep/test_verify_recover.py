"""`modmill verify --recover`: a workspace whose log was lost answers as before, and a run finds nothing to do."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.cli import entry
from engine.pipeline import config as pipeline
from engine.run import job
from engine.upkeep.verify import verify
from manifests.catalog.catalog import Catalog
from manifests.recover.recover import recover
from manifests.store.storage import open_storage

PIPELINE = """
workspace: work
corpora:
  photos:
    source: photos
    part_rows: 4
    crops: 2
    modalities: {rgb: {keep: true, tokens: false}, boxes: {}, palette: {}, caption: {}}
  notes:
    source: notes.jsonl
    kind: text
snapshots: {all: {where: "corpus = 'photos'", modalities: [palette, caption]}}
engine: {runner: local, workers: 1, batch: 4}
"""
VIEWS = ("corpora", "parts", "samples", "shards", "recipes", "coverage", "missing", "complete_parts", "failures")
VIEWS += ("quality", "lineage", "tokenizers", "snapshots", "boxes", "captions", "palettes", "forgotten")
# What only the lost log knew.
OWN = {"version", "run", "time"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_photos) -> Path:
    folder = tmp_path_factory.mktemp("recover")
    photos = make_photos(folder / "photos", 6)
    (photos / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.jsonl").write_text('{"text": "a red cube"}\n{"text": "a blue sphere on sand"}\n')
    (folder / "pipeline.yaml").write_text(PIPELINE)
    job.run(pipeline.load(folder / "pipeline.yaml"), quiet=True)
    # One is gone since, of the second part.
    with Catalog.open(folder / "work") as catalog:
        query = "SELECT source FROM samples WHERE corpus = 'photos' AND part = 1 AND source LIKE 'photo%' LIMIT 1"
        (photos / catalog.sql(query)["source"].to_pylist()[0]).unlink()
    job.run(pipeline.load(folder / "pipeline.yaml"), quiet=True)
    return folder


@pytest.fixture
def work(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workspace; the sources stay where they are."""
    monkeypatch.setenv("MODMILL_CACHE", str(tmp_path / "cache"))
    shutil.copytree(whole / "work", tmp_path / "work")
    return tmp_path / "work"


def answers(work: Path) -> dict[str, list[dict[str, Any]]]:
    with Catalog.open(work) as catalog:
        rows = {view: catalog.sql(f"SELECT * FROM {view}").to_pylist() for view in VIEWS}
    return {
        view: sorted(({k: v for k, v in row.items() if k not in OWN} for row in found), key=repr)
        for view, found in rows.items()
    }


def run_again(whole: Path, work: Path) -> job.Done:
    return job.run(pipeline.load(whole / "pipeline.yaml", [f"workspace={work}"]), quiet=True)


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        entry.main(list(arguments))
    return int(ended.value.code or 0)


def is_clean(work: Path) -> bool:
    with Catalog.open(work) as catalog:
        verified = verify(catalog, deep=True)
        return (verified.findings, verified.left_over, verified.notes) == ([], [], [])


def test_a_lost_log_is_made_anew(whole: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = answers(work)
    assert before["corpora"][1]["vanished"] == 1
    assert before["failures"]
    shutil.rmtree(work / "_meta/log")
    (work / "_meta/format.json").unlink()
    assert command("verify", str(work), "--recover") == 0
    told = capsys.readouterr().out
    assert told.startswith("recovered: 2 corpora, 3 parts, ")
    assert "1 snapshots" in told
    assert answers(work) == before
    assert is_clean(work)
    assert run_again(whole, work).did_nothing
    assert answers(work) == before
    # And the recovered log is as good a base as any: the same again.
    assert command("verify", str(work)) == 0
    assert command("verify", str(work), "--recover") == 0
    assert "the log stands; 0 sidecars were written from it" in capsys.readouterr().out


def test_a_shard_without_a_sidecar_is_made_again_by_the_next_run(
    whole: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = answers(work)
    (lonely, *_) = sorted(work.glob("data/photos/rgb/*/part-0000000.c01-*.tar"))
    data = lonely.read_bytes()
    failed = len([row for row in before["failures"] if (row["part"], row["crop"], row["modality"]) == (0, 1, "rgb")])
    lonely.with_suffix(".json").unlink()
    shutil.rmtree(work / "_meta/log")
    assert command("verify", str(work), "--recover", "--format", "json") == 0
    path = str(lonely.relative_to(work))
    assert json.loads(capsys.readouterr().out) == [
        {"left out": path, "why": "it has no sidecar; the next run makes it again"}
    ]
    with Catalog.open(work) as catalog:
        verified = verify(catalog)
    assert verified.findings == []
    assert (path, "orphan") in {(finding.path, finding.kind) for finding in verified.left_over}
    assert run_again(whole, work).counts == {
        "shards": 1,
        "rows": 4,
        "failed_rows": failed,
        "new_samples": 0,
        "new_parts": 0,
        "dropped_samples": 0,
    }
    assert lonely.read_bytes() == data
    assert is_clean(work)
    assert answers(work) == before


def test_a_workspace_of_before_sidecars_of_samples(whole: Path, work: Path) -> None:
    """A run with its pipeline file says what the corpora are; its samples are not taken in a second time."""
    before = answers(work)
    for path in [*work.glob("data/*/_samples/*.json"), *work.glob("tokenizers/*.json")]:
        path.unlink()
    shutil.rmtree(work / "_meta/log")
    found = recover(open_storage(work))
    assert [note.partition(":")[0] for note in found.notes] == ["notes", "photos"]
    assert (found.tokenizers, found.left_out) == (1, {})
    assert run_again(whole, work).did_nothing
    after = answers(work)
    for view in set(VIEWS) - {"tokenizers"}:
        assert after[view] == before[view], view
    # A fit's options and figures stood in the log alone.
    known = ("name", "digest", "family", "vocabulary", "path", "is_current")
    assert [[row[name] for name in known] for row in after["tokenizers"]] == [
        [row[name] for name in known] for row in before["tokenizers"]
    ]
    assert command("verify", str(work), "--recover") == 0
    assert is_clean(work)


def test_a_workspace_file_that_is_lost_alone(work: Path) -> None:
    """Only `_meta/format.json` is lost: it comes back with the old id, and the log is not touched."""
    before = answers(work)
    identity = json.loads((work / "_meta/format.json").read_text())["id"]
    (work / "_meta/format.json").unlink()
    assert command("verify", str(work)) == 2
    assert command("verify", str(work), "--recover") == 0
    assert json.loads((work / "_meta/format.json").read_text())["id"] == identity
    assert answers(work) == before


def test_the_verb_tells_wrong_from_left_over(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "data/photos/rgb/.part-0000000.c00-00000000.tar.1-a.tmp").write_bytes(b"half")
    assert command("verify", str(work), "--deep") == 0
    told = capsys.readouterr().out
    assert "not wrong, but left over: 1 temporary" in told
    assert told.splitlines()[-1].startswith("ok: ")
    (shard, *_) = work.glob("data/photos/caption/*/part-0000000-*[0-9a-f].parquet")
    shard.unlink()
    assert command("verify", str(work), "--format", "csv") == 1
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "kind,path,problem"
    assert [row.partition(",")[0] for row in rows[1:]] == ["wrong", "temporary"]
