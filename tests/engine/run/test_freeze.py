"""Snapshots by the verb `modmill snapshot`, by the pipeline file, and in `modmill verify`."""

import json
import shutil
from pathlib import Path

import pytest

import modmill
from engine.cli import entry
from engine.pipeline import config as pipeline
from engine.run import freeze, job
from engine.upkeep.verify import verify
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError, WorkspaceError
from manifests.formats import sidecars
from manifests.log import entries as log
from manifests.log.actions import RunStarted, SnapshotAdded
from manifests.log.lease import writer_lease
from manifests.recipe import sha256_hex
from manifests.snapshots import snapshot
from manifests.store import paths
from manifests.store.storage import open_storage

PIPELINE = """
workspace: work
corpora:
  photos:
    source: photos
    part_rows: 4
    modalities: {palette: {}, metadata: {}, caption: {tokens: false}}
tokenizers: {text: {vocabulary: 4500}}
engine: {runner: local, workers: 1, batch: 4}
"""
SNAPSHOTS = """
snapshots:
  demo: {where: "part = 0", modalities: [palette], hold_out: 0.5}
  whole: {}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_photos) -> Path:
    """A folder with seven photographs, a pipeline file with snapshots, and what one run makes of it."""
    folder = tmp_path_factory.mktemp("snapshot")
    make_photos(folder / "photos", 7)
    (folder / "pipeline.yaml").write_text(PIPELINE + SNAPSHOTS)
    done = job.run(pipeline.load(folder / "pipeline.yaml"), quiet=True)
    assert done.counts["snapshots"] == 2
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def work(folder: Path) -> Path:
    return folder / "work"


def run(folder: Path, *overrides: str, quiet: bool = True, **options) -> job.Done:
    return job.run(pipeline.load(folder / "pipeline.yaml", overrides), quiet=quiet, **options)


def command(*arguments: object) -> int:
    """The exit code of `modmill ARGUMENTS`."""
    with pytest.raises(SystemExit) as end:
        entry.main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


# -- the verb ---------------------------------------------------------------------------------------------------------


def test_a_condition_without_a_name_is_no_listing(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("snapshot", work, "--where", "row < 2") == 2
    assert "give its NAME" in capsys.readouterr().err


def test_the_verb_makes_and_lists(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("snapshot", work, "mine", "--where", "row < 2", "--modalities", "palette,metadata")
    assert command(*arguments, "--hold-out", "0", "--format", "json") == 0
    shown = capsys.readouterr()
    lines = json.loads(shown.out)
    assert [(line["corpus"], line["modality"], line["rows"], line["held_out"], line["shards"]) for line in lines] == [
        ("photos", "metadata", 4, 0, 2),
        ("photos", "palette", 4, 0, 2),
    ]
    assert all(len(line["recipe"]) == 12 and line["with_tokens"] == 4 for line in lines)
    assert "snapshot mine: 4 rows, 0 of them held out, 2 modalities" in shown.err
    assert command("snapshot", work, "--format", "csv") == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0] == "snapshot,rows,held_out,modalities,where,sha256,made,files,used_by,replaced_by"
    assert [line.partition(",")[0] for line in listed[1:]] == ["demo", "whole", "mine"]
    assert all(line.endswith(",there,,") for line in listed[1:])
    shutil.rmtree(work / "_meta/snapshots/mine")
    assert command("snapshot", work, "--format", "csv") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(",gone,,")
    assert command("snapshot", work) == 0
    assert "3 rows" in capsys.readouterr().out


def test_the_verb_shares_rows_out(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("snapshot", work, "half", "--modalities", "palette", "--hold-out", "0", "--format", "json")
    assert command(*arguments, "--split", "a=0.5", "--split", "b=0.5") == 0
    shown = capsys.readouterr()
    lines = json.loads(shown.out)
    assert [line["snapshot"] for line in lines] == ["half-a", "half-b"]
    assert sum(line["rows"] for line in lines) == 7
    assert shown.err.count("snapshot half-") == 2
    with Catalog.open(work) as catalog:
        found = catalog.sql("SELECT snapshot, \"where\", run FROM snapshots WHERE snapshot LIKE 'half-%'").to_pylist()
        splits = catalog.sql("SELECT config -> 'splits' AS splits FROM runs WHERE run = ?", [found[0]["run"]])
    assert [row["where"] for row in found] == ["split_share(key) < 0.5", "split_share(key) >= 0.5"]
    assert json.loads(splits["splits"][0].as_py()) == {"a": "0.5", "b": "0.5"}


def test_the_verb_takes_groups_and_complete_rows(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Catalog.open(work) as catalog:
        keys = catalog.sql("SELECT key FROM samples ORDER BY part, row")["key"].to_pylist()
    lines = (f"photos,{key},{row // 2}" for row, key in enumerate(keys))
    (tmp_path / "patients.csv").write_text("\n".join(["corpus,key,patient", *lines]))
    arguments = ("snapshot", work, "study", "--attach", tmp_path / "patients.csv", "--complete", "--hold-out", "0")
    assert (
        command(*arguments, "--split", "a=0.75", "--split", "b=0.25", "--split-by", "patient", "--format", "json") == 0
    )
    assert {line["with_tokens"] == line["rows"] for line in json.loads(capsys.readouterr().out)} == {True}
    sides = [snapshot.read(open_storage(work), f"study-{name}") for name in "ab"]
    for part in sides[0].parts:
        assert (part.selected[0::2][: len(part.selected) // 2] == part.selected[1::2]).all()
    assert sum(side.rows for side in sides) == 7
    assert all(side.complete and side.split_by == "patient" for side in sides)
    assert command("snapshot", work, "--complete") == 2


def test_the_verb_takes_columns_of_a_file(work: Path, tmp_path: Path) -> None:
    with Catalog.open(work) as catalog:
        keys = catalog.sql("SELECT key FROM samples ORDER BY key")["key"].to_pylist()
    scores = tmp_path / "scores.csv"
    scores.write_text("key,aesthetic\n" + "".join(f"{key},{number}\n" for number, key in enumerate([*keys, "gone"])))
    made = freeze.make(
        str(work),
        "pretty",
        where="aesthetic >= 4",
        modalities=["palette"],
        hold_out=0,
        attach=[f"{scores}:key"],
        quiet=True,
    )
    assert [one.rows for one in made] == [3]
    with Catalog.open(work) as catalog:
        runs = catalog.sql("SELECT run, config -> 'attach' AS attach FROM runs WHERE config ->> 'snapshot' = 'pretty'")
    recorded = [{"file": "scores.csv", "on": ["key"], "sha256": sha256_hex(scores.read_bytes())}]
    assert json.loads(runs["attach"][0].as_py()) == recorded
    with pytest.raises(ConfigError, match="there is no such file to attach"):
        freeze.make(str(work), "x", where=None, modalities=None, hold_out=0, attach=["none.csv"], quiet=True)


def test_the_listing_tells_who_trained_on_it_and_what_took_its_place(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = snapshot.read(open_storage(work), "demo")
    config = {"snapshots": [{"uri": "elsewhere#demo", "sha256": demo.sha256}]}
    runs = [
        RunStarted(run=run, kind="train", time=log.now(), host="h", commit=None, versions={}, config=config)
        for run in ("t1", "t2")
    ]
    successor = SnapshotAdded(
        snapshot="demo-2",
        path=paths.snapshot("demo-2"),
        sha256="0" * 64,
        rows=3,
        held_out=1,
        where=None,
        modalities=[],
        replaces="demo",
    )
    with Catalog.open(work) as catalog:
        catalog.commit([*runs, successor], run="t1")
    assert command("snapshot", work, "--format", "json") == 0
    lines = {line["snapshot"]: line for line in json.loads(capsys.readouterr().out)}
    assert (lines["demo"]["used_by"], lines["demo"]["replaced_by"]) == ("t1, t2", "demo-2")
    assert (lines["whole"]["used_by"], lines["whole"]["replaced_by"]) == (None, None)


def test_the_verb_is_a_recorded_run(work: Path) -> None:
    assert command("snapshot", work, "mine", "--hold-out", "0.5") == 0
    assert command("snapshot", work, "mine", "--hold-out", "0.5") == 0
    with Catalog.open(work) as catalog:
        query = "SELECT kind, status, counts ->> 'snapshots' AS made, config ->> 'hold_out' AS hold_out FROM runs"
        runs = [row for row in catalog.sql(query).to_pylist() if row["kind"] == "snapshot"]
        recorded = catalog.sql("SELECT s.run FROM snapshots s JOIN runs USING (run) WHERE kind = 'snapshot'")
    assert [(row["status"], row["made"], row["hold_out"]) for row in runs] == [
        ("done", "1", "0.5"),
        ("done", "0", "0.5"),
    ]
    assert recorded.num_rows == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("demo",), "stands and is frozen"),
        (("x", "--where", "rwo = 1"), "the condition 'rwo = 1' is refused"),
        (("x", "--where", "row > 99"), "picks no row"),
        (("x", "--modalities", "palete"), "did you mean 'palette'?"),
        (("x", "--modalities", "caption"), "'caption' is kept as labels only"),
        (("x", "--hold-out", "1"), "hold_out is 1.0"),
        (("a/b",), "the name 'a/b'"),
        (("x", "--split", "a=0.9", "--split", "b=0.2"), "a=0.9, b=0.2; expected shares over 0"),
    ],
)
def test_mistakes_end_with_2(
    work: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("snapshot", work, *more) == 2
    assert message in capsys.readouterr().err
    with Catalog.open(work) as catalog:
        assert catalog.sql("SELECT status FROM runs").to_pylist()[-1]["status"] == "failed"


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (("train",), "--split train: expected NAME=SHARE, such as train=0.9"),
        (("train=most",), "expected NAME=SHARE"),
        (("a=0.1", "a=0.2"), "a stands twice"),
    ],
)
def test_splits_that_cannot_be_read_are_refused_before_anything_is_done(
    work: Path, splits: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [word for split in splits for word in ("--split", split)]
    assert command("snapshot", work, "x", *options) == 2
    assert message in capsys.readouterr().err
    assert command("snapshot", work, *options) == 2
    assert "give its NAME" in capsys.readouterr().err
    with Catalog.open(work) as catalog:
        assert catalog.sql("SELECT status FROM runs").to_pylist()[-1]["status"] == "done"


def test_no_workspace_is_made_by_a_snapshot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("snapshot", tmp_path / "nowhere", "x") == 2
    assert "is no modmill workspace" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


def test_one_writer_at_a_time(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with writer_lease(open_storage(work), "another"):
        assert command("snapshot", work, "mine") == 2
        assert "is being written by another" in capsys.readouterr().err
        assert command("snapshot", work) == 0


# -- the pipeline file ------------------------------------------------------------------------------------------------


def test_the_pipeline_file_makes_snapshots(work: Path) -> None:
    demo, whole = (snapshot.open_snapshot(f"{work}#{name}") for name in ("demo", "whole"))
    assert (demo.rows, demo.where, demo.hold_out) == (4, "part = 0", 0.5)
    assert [modality.modality for modality in demo.modalities] == ["palette"]
    assert (whole.rows, whole.where, whole.hold_out) == (7, None, 0.02)
    assert [modality.modality for modality in whole.modalities] == ["metadata", "palette"]


def test_a_second_run_has_nothing_to_do(folder: Path) -> None:
    before = snapshot.open_snapshot(f"{folder / 'work'}#whole").sha256
    assert run(folder).did_nothing
    assert run(folder, steps=("snapshot",)).did_nothing
    assert snapshot.open_snapshot(f"{folder / 'work'}#whole").sha256 == before


def test_a_snapshot_stays_when_photographs_come(folder: Path, make_photos, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot.open_snapshot(f"{folder / 'work'}#whole")
    run(folder, quiet=False)
    assert "frozen" not in capsys.readouterr().err
    make_photos(folder / "photos", 12)
    done = run(folder, quiet=False)
    said = capsys.readouterr().err
    assert done.counts["new_samples"] == 5
    assert "snapshots" not in done.counts
    assert "snapshot whole is frozen at 7 rows, and there is more since; a new one: modmill snapshot" in said
    after = snapshot.open_snapshot(f"{folder / 'work'}#whole")
    assert (after.sha256, after.rows) == (before.sha256, 7)
    assert run(folder, "snapshots.later={}").counts["snapshots"] == 1
    assert snapshot.open_snapshot(f"{folder / 'work'}#later").rows == 12


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("snapshots.demo.where=row = 1", "where is 'part = 0' there and 'row = 1' in the file"),
        ("snapshots.demo.hold_out=0.1", "hold_out is 0.5 there and 0.1 in the file"),
        ("snapshots.demo.modalities=[palette, metadata]", "modalities are"),
        ("snapshots.demo.modalities=[palette=00000]", "modalities are"),
    ],
)
def test_a_snapshot_that_the_file_now_describes_otherwise(folder: Path, override: str, message: str) -> None:
    with pytest.raises(WorkspaceError, match=f"(?s){message}.*another name"):
        run(folder, override)


def test_a_recipe_may_be_named_in_the_file(folder: Path) -> None:
    fingerprint = snapshot.open_snapshot(f"{folder / 'work'}#demo").shards[0].fingerprint
    override = f"snapshots.demo.modalities=[palette={fingerprint[:10]}]"
    assert run(folder, override).did_nothing


def test_only_snapshot_is_a_step(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "photos", tmp_path / "photos")
    (tmp_path / "pipeline.yaml").write_text(PIPELINE + SNAPSHOTS)
    run(tmp_path, steps=("ingest", "fit", "label", "tokenize"))
    assert snapshot.names(open_storage(tmp_path / "work")) == []
    assert run(tmp_path, steps=("snapshot",)).counts == {"snapshots": 2}


def test_a_crash_before_the_log_is_mended_though_the_log_grew(folder: Path, make_photos) -> None:
    """The folder is whole, the log does not know it, and what the file asks for has changed since."""
    work = folder / "work"
    for path in sorted((work / "_meta" / "log").glob("*.json"), reverse=True):
        document = json.loads(path.read_text())
        path.unlink()
        if any(action["action"] == "snapshot" and action["snapshot"] == "whole" for action in document["actions"]):
            break
    make_photos(folder / "photos", 9)
    assert run(folder, "snapshots={whole: {}}").counts["new_samples"] == 2
    with Catalog.open(work) as catalog:
        rows = {row["snapshot"]: row["rows"] for row in catalog.snapshots().to_pylist()}
    assert rows == {"demo": 4, "whole": 7}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{demo: {hold_out: 1}}", "snapshots.demo.hold_out is 1"),
        ("{demo: {hold_out: -0.5}}", "snapshots.demo.hold_out is -0.5"),
        ("{demo: {wehre: x}}", "snapshots.demo.wehre is no option; did you mean 'where'?"),
        ("{demo: {modalities: []}}", "snapshots.demo.modalities is"),
        (
            "{demo: {modalities: [pallete]}}",
            "snapshots.demo.modalities: unknown modality 'pallete'; did you mean 'palette'?",
        ),
        ("{-demo: {}}", "has the name '-demo'"),
        ("{demo: {where: ''}}", "snapshots.demo.where is ''"),
    ],
)
def test_mistakes_in_the_file_are_found_before_the_work(tmp_path: Path, section: str, message: str) -> None:
    (tmp_path / "pipeline.yaml").write_text(f"{PIPELINE}\nsnapshots: {section}\n")
    with pytest.raises(ConfigError) as caught:
        pipeline.load(tmp_path / "pipeline.yaml")
    assert message in str(caught.value)


def test_the_schema_knows_snapshots() -> None:
    section = pipeline.schema()["$defs"]["SnapshotConfig"]
    assert set(section["properties"]) == {"where", "modalities", "hold_out", "complete"}


# -- Python, and verify -----------------------------------------------------------------------------------------------


def test_the_python_door_reads_a_snapshot(work: Path) -> None:
    with modmill.open(work) as workspace:
        assert workspace.snapshot("whole").rows == 7
        assert workspace.sql("SELECT snapshot FROM snapshots")["snapshot"].to_pylist() == ["demo", "whole"]
        with pytest.raises(WorkspaceError, match="did you mean 'whole'"):
            workspace.snapshot("whol")


def findings(work: Path) -> list[tuple[str, str]]:
    with Catalog.open(work) as catalog:
        return [(finding.path, finding.problem) for finding in verify(catalog).findings]


def test_verify_counts_snapshots(work: Path) -> None:
    with Catalog.open(work) as catalog:
        verified = verify(catalog)
    assert (verified.snapshots, verified.findings) == (2, [])


def test_verify_finds_a_snapshot_that_was_altered_or_is_gone(work: Path) -> None:
    parts = work / "_meta/snapshots/demo/parts.parquet"
    parts.write_bytes(parts.read_bytes()[:-1])
    shutil.rmtree(work / "_meta/snapshots/whole")
    found = findings(work)
    assert [path for path, _ in found] == ["_meta/snapshots/demo", "_meta/snapshots/whole"]
    assert "altered or truncated" in found[0][1]
    assert "has no snapshot 'whole'" in found[1][1]


def test_verify_finds_a_snapshot_that_the_log_knows_otherwise(work: Path) -> None:
    storage = open_storage(work)
    shutil.copytree(work / "_meta/snapshots/demo", work / "_meta/snapshots/other")
    assert findings(work) == []
    with Catalog(storage) as catalog:
        fields = {
            "snapshot": "other",
            "path": paths.snapshot("other"),
            "rows": 1,
            "held_out": 0,
            "where": None,
            "modalities": [],
        }
        catalog.commit([SnapshotAdded(**fields, sha256="ab" * 32)], run="r")  # type: ignore[arg-type]
    found = findings(work)
    assert len(found) == 1
    assert "the log says abababababab" in found[0][1]


@pytest.mark.parametrize(("damage", "problem"), [("gone", "is gone, and the snapshot"), ("cut", "bytes, the snapshot")])
def test_verify_looks_at_shards_that_were_replaced_since(work: Path, damage: str, problem: str) -> None:
    """A snapshot keeps a shard that a later record replaced: the log no longer counts it as live."""
    with Catalog.open(work) as catalog:
        old = next(shard for shard in catalog.live_shards() if shard.form == "token" and shard.modality == "palette")
        data = catalog.storage.read(old.path)
        new = paths.renamed(old.path, "ff" * 32)
        catalog.storage.put(new, data)
        again = type(old)(**{**vars(old), "path": new})
        recipe = json.loads(catalog.storage.read(sidecars.path_of(old)))["recipe"]
        catalog.storage.put(sidecars.path_of(again), sidecars.of_shard(again, recipe))
        catalog.commit([again], run="r")
    assert findings(work) == []
    path = work / old.path
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-1])
    found = findings(work)
    assert [name for name, _ in found] == [old.path]
    assert problem in found[0][1]
