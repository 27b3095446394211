"""The main job, whole: on both runners, after kills, with bad inputs, with more photographs."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
import webdataset

from engine.pipeline import config as pipeline
from engine.run import job
from engine.upkeep import verify as verifying
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError, ModmillError, TooManyFailures, WorkspaceError

PIPELINE = """
workspace: {workspace}
corpora:
  photos:
    source: {photos}
    crops: 2
    part_rows: 8
    modalities: [rgb, edges, boxes, metadata, palette, caption]
  notes:
    source: {notes}
    kind: text
modalities:
  rgb: {{keep: true}}
  edges: {{format: webdataset}}
tokenizers:
  rgb: {{steps: 6, batch: 4, codebook: 32, width: 16, checkpoint_every: 2}}
  edges: {{steps: 3, batch: 4, codebook: 16, width: 16, checkpoint_every: 2}}
fit_rows: 16
engine: {{runner: local, workers: 1, batch: 4}}
"""


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes.jsonl"
    path.write_text(
        "".join(
            f'{{"text": "note {i}: light falls on a {c} cube", "year": {1990 + i}}}\n'
            for i, c in enumerate(["red", "blue", "green"])
        )
    )
    return path


@pytest.fixture
def write_pipeline(tmp_path: Path, photos: Path, notes: Path):
    def write(workspace: str = "work", **sources: Path) -> Path:
        path = tmp_path / f"{workspace}.yaml"
        path.write_text(
            PIPELINE.format(workspace=tmp_path / workspace, photos=sources.get("photos", photos), notes=notes)
        )
        return path

    return write


def run(file: Path, *overrides: str, **options) -> job.Done:
    return job.run(pipeline.load(file, overrides), quiet=True, **options)


def shard_files(workspace: Path) -> dict[str, bytes]:
    """Every file that a run must make the same bytes of: shards, samples, failed files, tokenizers."""
    files = {}
    for folder in ("data", "tokenizers"):
        for path in sorted((workspace / folder).rglob("*")):
            sidecar = path.suffix == ".json" and folder == "data"
            # A killed writer leaves a hidden temporary file, and nothing under a name of ours.
            if path.is_file() and not sidecar and not path.name.startswith("."):
                files[str(path.relative_to(workspace))] = path.read_bytes()
    return files


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, make_photos) -> tuple[Path, Path]:
    """A folder of photographs, and the workspace that one undisturbed local run makes of it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    photos = make_photos(folder / "photos", 20)
    notes = folder / "notes.jsonl"
    notes.write_text('{"text": "a red cube"}\n{"text": "a blue sphere on sand"}\n')
    file = folder / "pipeline.yaml"
    file.write_text(PIPELINE.format(workspace=folder / "work", photos=photos, notes=notes))
    run(file)
    return folder, folder / "work"


def test_everything_is_made_and_verifies(undisturbed: tuple[Path, Path]) -> None:
    _, workspace = undisturbed
    with Catalog.open(workspace) as catalog:
        coverage = {(row["corpus"], row["modality"], row["form"]): row for row in catalog.coverage()}
        assert coverage["photos", "rgb", "token"]["crops"] == 2
        for row in coverage.values():
            assert row["parts_missing"] == 0, row
            assert row["failed"] == 0, row
            assert row["rows"] == row["ok"] + row["absent"], row
        assert coverage["photos", "rgb", "token"]["tokens"] == 20 * 2 * 196
        assert set(coverage) == {
            *(("photos", name, "token") for name in ("rgb", "edges", "boxes", "metadata", "palette", "caption")),
            *(("photos", name, "label") for name in ("rgb", "boxes", "metadata", "palette", "caption")),
            ("notes", "text", "token"),
        }
        verified = verifying.verify(catalog)
        assert verified.findings == []
        assert verified.shards == len(catalog.live_shards())
        assert catalog.sql("SELECT count(*) AS n FROM boxes WHERE area > 0").to_pylist()[0]["n"] > 0


def test_token_shards_open_in_plain_pyarrow_and_duckdb(undisturbed: tuple[Path, Path]) -> None:
    _, workspace = undisturbed
    path = sorted((workspace / "data/photos/rgb").rglob("*.c01-*.parquet"))[0]
    table = pq.read_table(path)
    assert table.column_names == ["key", "status", "tokens"]
    assert str(table.schema.field("tokens").type) == "list<element: uint8>"
    rows = duckdb.sql(f"SELECT key, status, len(tokens) AS n, list_max(tokens) AS most FROM '{path}'").fetchall()
    assert len(rows) == 8
    assert all(status == 0 and count == 196 and most < 32 for _, status, count, most in rows)


def test_pixel_and_token_tars_open_in_plain_webdataset(undisturbed: tuple[Path, Path]) -> None:
    _, workspace = undisturbed
    pixels = sorted((workspace / "data/photos/rgb").rglob("*.c00-*.tar"))[0]
    rows = list(webdataset.WebDataset(str(pixels), shardshuffle=False).decode("rgb8"))
    assert len(rows) == 8
    assert rows[0]["png"].shape == (224, 224, 3)
    assert rows[0]["json"] == {"key": rows[0]["__key__"], "status": 0}
    tokens = sorted((workspace / "data/photos/edges").rglob("*.tar"))[0]
    first = next(iter(webdataset.WebDataset(str(tokens), shardshuffle=False).decode()))
    assert first["npy"].shape == (196,)
    assert first["npy"].dtype == "uint8"


def test_a_second_run_does_nothing(undisturbed: tuple[Path, Path]) -> None:
    folder, workspace = undisturbed
    before = shard_files(workspace)
    done = run(folder / "pipeline.yaml")
    assert done.did_nothing
    assert shard_files(workspace) == before


def test_more_photographs_add_parts_and_change_nothing(tmp_path: Path, undisturbed, make_photos) -> None:
    folder, _ = undisturbed
    for name in ("work", "photos"):
        shutil.copytree(folder / name, tmp_path / name)
    file = tmp_path / "pipeline.yaml"
    file.write_text(
        PIPELINE.format(workspace=tmp_path / "work", photos=tmp_path / "photos", notes=folder / "notes.jsonl")
    )
    before = shard_files(tmp_path / "work")
    make_photos(tmp_path / "photos" / "more", 5, seed=7)
    done = run(file)
    after = shard_files(tmp_path / "work")
    assert {name: after[name] for name in before} == before
    new = set(after) - set(before)
    assert new
    assert all("part-0000003" in name for name in new), new
    assert done.counts["new_samples"] == 5
    assert "tokenizers_fitted" not in done.counts


def test_another_crop_adds_files_and_changes_none(tmp_path: Path, undisturbed) -> None:
    folder, _ = undisturbed
    shutil.copytree(folder / "work", tmp_path / "work")
    before = shard_files(tmp_path / "work")
    done = run(folder / "pipeline.yaml", f"workspace={tmp_path / 'work'}", "corpora.photos.crops=3")
    after = shard_files(tmp_path / "work")
    assert {name: after[name] for name in before} == before
    assert all(".c02-" in name for name in set(after) - set(before))
    # Three parts; rgb label and token, edges and boxes token.
    assert done.counts["shards"] == 3 * 4


def test_another_version_of_one_parameter_redoes_that_modality_alone(tmp_path: Path, undisturbed) -> None:
    folder, _ = undisturbed
    shutil.copytree(folder / "work", tmp_path / "work")
    before = shard_files(tmp_path / "work")
    run(
        folder / "pipeline.yaml",
        f"workspace={tmp_path / 'work'}",
        "corpora.photos.modalities.palette.parameters.side=32",
    )
    new = set(shard_files(tmp_path / "work")) - set(before)
    assert {name.split("/")[2] for name in new} == {"palette"}


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 2])
def test_ray_makes_the_same_bytes(tmp_path: Path, undisturbed, workers: int, ray_cluster) -> None:
    folder, workspace = undisturbed
    run(folder / "pipeline.yaml", f"workspace={tmp_path / 'work'}", "engine.runner=ray", f"engine.workers={workers}")
    assert shard_files(tmp_path / "work") == shard_files(workspace)


def test_two_local_workers_make_the_same_bytes(tmp_path: Path, undisturbed) -> None:
    folder, workspace = undisturbed
    run(folder / "pipeline.yaml", f"workspace={tmp_path / 'work'}", "engine.workers=2")
    assert shard_files(tmp_path / "work") == shard_files(workspace)


KILLED = """
import sys
from pathlib import Path
from engine.pipeline import config
from engine.run import job
job.run(config.load(Path(sys.argv[1]), sys.argv[2:]), quiet=True)
"""


def kill_after(seconds: float, file: Path, *overrides: str) -> int:
    """Starts a run in a process of its own and kills it outright."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(file), *overrides], start_new_session=True)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode


def kill_when(pattern: str, file: Path, workspace: Path, *overrides: str) -> None:
    """Starts a run and kills it outright as soon as a file of that pattern stands in the workspace."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(file), *overrides], start_new_session=True)
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None and not list(workspace.glob(pattern)):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_killed_at_any_moment_the_next_run_makes_the_same_bytes(tmp_path: Path, undisturbed) -> None:
    """In ingest, in a fit, between a tokenizer's files and its commit, in the work, at its end."""
    folder, workspace = undisturbed
    work = tmp_path / "work"
    override = f"workspace={work}"
    moments = [
        "data/photos/_samples/*.parquet",
        "runs/fit-rgb-*/checkpoint-00000002.safetensors",
        "tokenizers/rgb-*/config.json",
        "data/photos/rgb/*/*.c00-*.parquet",
        "data/photos/palette/*/part-0000001-*.parquet",
    ]
    for moment in moments:
        kill_when(moment, folder / "pipeline.yaml", work, override)
    run(folder / "pipeline.yaml", override)
    assert shard_files(work) == shard_files(workspace)
    with Catalog.open(work) as catalog:
        assert verifying.verify(catalog).findings == []


def test_bad_inputs_are_failed_rows_and_the_rest_goes_on(
    tmp_path: Path, undisturbed, make_photos, hostile_files
) -> None:
    folder, _ = undisturbed
    photos = make_photos(tmp_path / "photos", 9)
    broken = hostile_files(photos)
    shutil.copytree(folder / "work/tokenizers", tmp_path / "unused")
    file = tmp_path / "pipeline.yaml"
    file.write_text(PIPELINE.format(workspace=tmp_path / "work", photos=photos, notes=folder / "notes.jsonl"))
    run(file, "engine.max_failed_fraction=0.9")
    with Catalog.open(tmp_path / "work") as catalog:
        failed = catalog.sql(
            "SELECT DISTINCT s.source, f.stage, f.class FROM failures f JOIN samples s USING (corpus, key)"
        ).to_pylist()
        assert {row["source"] for row in failed} == set(broken)
        assert {row["class"] for row in failed} == {"DecodeError"}
        captions = {
            row["source"]: row["caption"] for row in catalog.sql("SELECT source, caption FROM samples").to_pylist()
        }
        assert captions["not_utf8.jpg"] is not None
        names = [source for source in captions if source.endswith("same.jpg")]
        assert len(names) == 2
        for row in catalog.coverage():
            assert row["rows"] == row["ok"] + row["failed"] + row["absent"]
            assert row["parts_missing"] == 0
        assert verifying.verify(catalog).findings == []
    assert run(file).did_nothing


def test_a_text_tokenizer_without_any_text_says_so(
    tmp_path: Path, make_photos, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = make_photos(tmp_path / "photos", 1)
    file = tmp_path / "pipeline.yaml"
    file.write_text(
        f"workspace: {tmp_path / 'work'}\ncorpora: {{photos: {{source: {photos}, modalities: [caption]}}}}\n"
        "engine: {runner: local, workers: 1}\n"
    )
    assert not list(photos.glob("*.txt"))
    job.run(pipeline.load(file), quiet=False)
    assert "tokenizer text: note: no sample has a caption yet" in capsys.readouterr().err


def test_too_many_failures_stop_the_run(tmp_path: Path, undisturbed, make_photos) -> None:
    folder, _ = undisturbed
    photos = make_photos(tmp_path / "photos", 4)
    for number in range(40):
        (photos / f"broken{number}.jpg").write_bytes(b"no picture")
    file = tmp_path / "pipeline.yaml"
    file.write_text(PIPELINE.format(workspace=tmp_path / "work", photos=photos, notes=folder / "notes.jsonl"))
    with pytest.raises(TooManyFailures, match="max_failed_fraction"):
        run(file)
    with Catalog.open(tmp_path / "work") as catalog:
        assert catalog.sql("SELECT status FROM runs").to_pylist() == [{"status": "over_budget"}]


def test_failed_rows_are_retried_when_asked(tmp_path: Path, undisturbed, make_photos) -> None:
    folder, _ = undisturbed
    photos = make_photos(tmp_path / "photos", 9)
    whole = sorted(photos.glob("*.jpg"))[0]
    good = whole.read_bytes()
    stored = tmp_path / "elsewhere.jpg"
    file = tmp_path / "pipeline.yaml"
    file.write_text(PIPELINE.format(workspace=tmp_path / "work", photos=photos, notes=folder / "notes.jsonl"))
    run(file, steps=("ingest",))
    shutil.move(whole, stored)
    run(file)
    with Catalog.open(tmp_path / "work") as catalog:
        assert {row["class"] for row in catalog.sql("SELECT class FROM failures").to_pylist()} == {"SourceError"}
    # It fails again, for another reason: equal shards, another failed file.
    whole.write_bytes(good[:100])
    assert run(file, retry=()).counts["failed_rows"] > 0
    with Catalog.open(tmp_path / "work") as catalog:
        messages = {row["message"] for row in catalog.sql("SELECT message FROM failures").to_pylist()}
        assert all("no longer the file that was ingested" in message for message in messages)
        assert verifying.verify(catalog).findings == []
    whole.write_bytes(good)
    assert run(file).did_nothing
    done = run(file, retry=())
    assert done.counts["failed_rows"] == 0 if "failed_rows" in done.counts else True
    with Catalog.open(tmp_path / "work") as catalog:
        assert catalog.sql("SELECT * FROM failures").num_rows == 0
        assert verifying.verify(catalog).findings == []


def test_a_changed_source_is_recorded_and_never_labeled_as_the_old(tmp_path: Path, undisturbed, make_photos) -> None:
    folder, _ = undisturbed
    photos = make_photos(tmp_path / "photos", 9)
    file = tmp_path / "pipeline.yaml"
    file.write_text(PIPELINE.format(workspace=tmp_path / "work", photos=photos, notes=folder / "notes.jsonl"))
    run(file, steps=("ingest",))
    first, second, *_ = sorted(photos.glob("*.jpg"))
    first.write_bytes(second.read_bytes())
    second.unlink()
    run(file)
    with Catalog.open(tmp_path / "work") as catalog:
        corpora = {row["corpus"]: row for row in catalog.corpora()}
        assert (corpora["photos"]["vanished"], corpora["photos"]["changed"]) == (1, 1)
        failed = catalog.sql("SELECT DISTINCT s.source, f.class FROM failures f JOIN samples s USING (corpus, key)")
        assert {(row["source"], row["class"]) for row in failed.to_pylist()} == {
            (first.name, "SourceError"),
            (second.name, "SourceError"),
        }


def test_three_photographs_are_enough(tmp_path: Path, undisturbed, make_photos) -> None:
    folder, _ = undisturbed
    photos = make_photos(tmp_path / "photos", 3)
    file = tmp_path / "pipeline.yaml"
    file.write_text(PIPELINE.format(workspace=tmp_path / "work", photos=photos, notes=folder / "notes.jsonl"))
    run(file)
    with Catalog.open(tmp_path / "work") as catalog:
        assert all(row["parts_missing"] == 0 for row in catalog.coverage())


def test_the_seed_of_a_corpus_cannot_change(undisturbed) -> None:
    folder, _ = undisturbed
    with pytest.raises(ConfigError, match=r"corpora.photos.seed is 1, but the corpus was made with 0"):
        run(folder / "pipeline.yaml", "corpora.photos.seed=1")


def test_a_newer_workspace_is_refused(tmp_path: Path, undisturbed) -> None:
    folder, _ = undisturbed
    (tmp_path / "work/_meta").mkdir(parents=True)
    (tmp_path / "work/_meta/format.json").write_text('{"format": 2, "id": "x"}')
    with pytest.raises(WorkspaceError, match=r"format 2.*newer modmill"):
        run(folder / "pipeline.yaml", f"workspace={tmp_path / 'work'}")


TRAINER = """
name: small
steps: 2
mixture: [{snapshot: "work#all"}]
model: {depth: 1}
masking: {inputs: [4, 32], targets: [4, 32]}
deepspeed: {train_batch_size: 2, gradient_accumulation_steps: 1, optimizer: {type: AdamW, params: {lr: 1.0e-3}}}
validation: {rows: 0}
threads: 1
"""


def test_the_pipeline_trains_last_and_only_once(tmp_path: Path, undisturbed) -> None:
    folder, workspace = undisturbed
    shutil.copytree(workspace, tmp_path / "work")
    (tmp_path / "train.yaml").write_text(TRAINER)
    overrides = (
        f"workspace={tmp_path / 'work'}",
        "snapshots.all={hold_out: 0.0, modalities: [rgb]}",
        f"train={tmp_path / 'train.yaml'}",
    )
    done = run(folder / "pipeline.yaml", *overrides)
    assert done.counts["training_steps"] == 2
    assert (Path(str(done.training_folder)) / "checkpoints" / "step-00000002" / "checkpoint.json").is_file()
    with Catalog.open(tmp_path / "work") as catalog:
        trained = catalog.sql("SELECT status FROM runs WHERE kind = 'train'").to_pylist()
    assert trained == [{"status": "done"}]
    again = run(folder / "pipeline.yaml", *overrides)
    assert again.did_nothing
    assert again.training_folder == done.training_folder


def test_weights_that_are_missing_are_told_before_the_ingest(tmp_path: Path, make_photos) -> None:
    photos = make_photos(tmp_path / "photos", 1)
    file = tmp_path / "pipeline.yaml"
    file.write_text(
        f"workspace: {tmp_path / 'work'}\ncorpora: {{photos: {{source: {photos}, modalities: {{dinov2: {{tokens: false, "
        f"parameters: {{checkpoint: {tmp_path / 'weights'}}}}}}}}}}}\nengine: {{runner: local}}\n"
    )
    with pytest.raises(ConfigError, match="no such file or folder"):
        run(file)
    assert not (tmp_path / "work").exists()


def test_a_mistake_in_the_trainer_file_is_told_before_any_work(tmp_path: Path, undisturbed) -> None:
    folder, _ = undisturbed
    (tmp_path / "train.yaml").write_text(TRAINER.replace("steps: 2", "stepps: 2"))
    overrides = (f"workspace={tmp_path / 'work'}", f"train={tmp_path / 'train.yaml'}")
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        run(folder / "pipeline.yaml", *overrides)
    assert not (tmp_path / "work").exists()


def test_one_step_at_a_time(tmp_path: Path, undisturbed) -> None:
    folder, workspace = undisturbed
    overrides = (f"workspace={tmp_path / 'work'}", "snapshots.everything={}")
    with pytest.raises(ConfigError, match="never ingested"):
        run(folder / "pipeline.yaml", *overrides, steps=("label",))
    for step in ("ingest", "fit", "label", "tokenize", "snapshot"):
        assert not run(folder / "pipeline.yaml", *overrides, steps=(step,)).did_nothing
    assert shard_files(tmp_path / "work") == shard_files(workspace)


def test_a_tokenizer_that_was_fitted_otherwise_stays_and_that_is_said(
    tmp_path: Path, make_photos: Callable[[Path, int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_photos(tmp_path / "photos", 4)

    def go(steps: int, **more: Any) -> str:
        document = {
            "workspace": str(tmp_path / "w"),
            "corpora": {"photos": {"source": str(source), "modalities": ["edges"]}},
            "tokenizers": {"edges": {"steps": steps, "batch": 4, "codebook": 16, "width": 16}},
            "engine": {"runner": "local", "workers": 1},
        }
        job.run(pipeline.PipelineConfig.model_validate(document), **more)
        return capsys.readouterr().err

    assert "fitted with other options" not in go(2)
    assert "tokenizer edges was fitted with other options (steps 2, now 3) and stays as it is; --refit fits" in go(3)
    assert "fitted with other options" not in go(3, refit=True)


def test_a_labeler_that_does_not_load_is_told_in_words(
    tmp_path: Path, make_photos: Callable[[Path, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from labelers.edges import Edges

    def broken(self: Any, low: int = 100, high: int = 200) -> None:
        raise RuntimeError("no weights here")

    monkeypatch.setattr(Edges, "__init__", broken)
    document = {
        "workspace": str(tmp_path / "w"),
        "corpora": {"photos": {"source": str(make_photos(tmp_path / "photos", 3)), "modalities": ["edges"]}},
        "engine": {"runner": "local", "workers": 1},
    }
    with pytest.raises(ModmillError, match="labeler 'edges' does not load: RuntimeError: no weights here"):
        job.run(pipeline.PipelineConfig.model_validate(document), quiet=True)
