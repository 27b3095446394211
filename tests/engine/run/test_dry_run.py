"""`modmill run --dry-run`: what would be done, why, at what cost, without a change in the workspace."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from engine.pipeline import config as pipeline
from engine.plan import corpus, costs
from engine.plan.corpus import corpus_plan
from engine.plan.missing import Wanted
from engine.run import dry_run, job, labeling
from engine.run import probe as probe_run
from manifests import units
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError, UserError
from manifests.store.storage import cache_folder

PIPELINE = """
workspace: {folder}/work
corpora:
  photos:
    source: {folder}/photos
    crops: 2
    part_rows: 4
    modalities: {{edges: {{}}, palette: {{tokens: false}}, caption: {{tokens: false}}}}
tokenizers:
  edges: {{steps: 2, batch: 4, codebook: 16, width: 16}}
engine: {{runner: local, workers: 1, batch: 4}}
"""


def load(folder: Path, *overrides: str) -> pipeline.PipelineConfig:
    file = folder / "pipeline.yaml"
    file.write_text(PIPELINE.format(folder=folder))
    return pipeline.load(file, overrides)


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a folder: time of change, content."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_where_nothing_can_be_decoded_it_and_the_run_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("empty.jpg", "text.jpg"):
        (tmp_path / "photos" / name).write_text(name.partition("empty")[0])
    config = load(tmp_path)
    sheet = tmp_path / "probe.png"
    text = "\n".join(dry_run.dry_run(config, sheet=sheet, quiet=True))
    assert "photos: 2 of 2 samples failed at decode with DecodeError (edges, palette), such as: " in text
    assert "nothing came of the samples" in text
    assert not sheet.exists()
    # So few rows stop no run; where there are enough it is told.
    warning = "of the rows failed, and engine.max_failed_fraction is 0.25: a run would stop with exit code 3"
    assert warning not in text
    monkeypatch.setattr(probe_run, "JUDGED_FROM_ROWS", 2)
    assert warning in "\n".join(dry_run.dry_run(config, sheet=sheet, quiet=True))
    with pytest.raises(ConfigError, match=r"to fit on \(the first failed at decode, DecodeError: .*\); mend that"):
        job.run(config, quiet=True)


def test_before_the_first_ingest_then_after_a_run_then_after_a_change(tmp_path: Path, photos: Path) -> None:
    config = load(tmp_path, "engine.gpu_hour_price=2")
    sheet = tmp_path / "sheets" / "probe.png"
    before = set(os.listdir(cache_folder()))
    text = "\n".join(dry_run.dry_run(config, sheet=sheet, quiet=True))
    assert not (tmp_path / "work").exists()
    assert "photos: 9 samples in the source, 9 to be ingested" in text
    assert "its tokenizer is to be fitted first" in text
    assert "not in these figures: fitting the tokenizers of edges, and their tokens" in text
    assert "worker-hours" in text
    assert "dollars" in text
    assert "at 1 worker, " in text
    assert "at 3 workers; more workers than 3 find no work" in text
    with Image.open(sheet) as image:
        assert image.width > 600
    assert set(os.listdir(cache_folder())) == before

    job.run(config, quiet=True)
    events = [json.loads(line) for path in (tmp_path / "work/runs").rglob("events.jsonl") for line in path.open()]
    said = [event["text"] for event in events if event["event"] == "message"]
    assert any(line.startswith("labeled: 9 samples read, 36 rows written") for line in said)
    left = tree(tmp_path / "work")
    assert "nothing to label" in dry_run.dry_run(config, sheet=sheet, quiet=True)[-1]
    with pytest.raises(ConfigError, match=r"photos\.part_rows is 5, but the corpus was made with 4"):
        dry_run.dry_run(load(tmp_path, "corpora.photos.part_rows=5"), sheet=sheet, quiet=True)

    for name in ("photo000.jpg", "photo001.jpg"):
        (photos / f"new-{name}").write_bytes((photos / name).read_bytes()[:-1])
    changed = load(tmp_path, "corpora.photos.modalities.palette.parameters={colors: 5}")
    text = "\n".join(dry_run.dry_run(changed, sheet=sheet, quiet=True))
    assert "3 stale (parameters.colors 7 → 5), 1 of new samples" in text
    assert "11 samples in the source, 2 to be ingested" in text
    text = "\n".join(dry_run.dry_run(changed, steps=("label",), sheet=sheet, quiet=True))
    assert "palette" in text
    assert "edges" not in text, "only labelers with work are probed"
    assert tree(tmp_path / "work") == left


def test_a_raised_container_makes_its_own_corpora_stale_and_no_others(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiffs").mkdir()
    Image.new("RGB", (90, 90), "red").save(tmp_path / "tiffs/a.TIF")
    modalities = "{palette: {tokens: false}, caption: {tokens: false}}"
    config = load(
        tmp_path,
        f"corpora.photos.modalities={modalities}",
        f"corpora.tiffs={{source: {tmp_path}/tiffs, modalities: {modalities}}}",
    )
    with monkeypatch.context() as before:
        before.setattr(corpus, "CONTAINER_VERSIONS", ())
        job.run(config, quiet=True)
    text = dry_run.dry_run(config, sheet=tmp_path / "probe.png", quiet=True)
    told = [line.split() for line in text if line.startswith(("photos ", "tiffs "))]
    assert [line[:3] for line in told[:1]] == [["tiffs", "palette", "label"]]
    assert "stale (image decoder-1 → decoder-1-tiff2)" in "\n".join(text)
    assert not any(line[0] == "photos" for line in told)
    # A run that lists no source goes by what the last one found.
    label = ("label",)
    assert "nothing to label" in dry_run.dry_run(config, steps=label, sheet=tmp_path / "p.png", quiet=True)[-1]
    assert job.run(config, quiet=True).counts["shards"] == 1
    assert job.run(config, steps=label, quiet=True).counts.get("shards", 0) == 0


def test_a_sheet_in_the_workspace_is_refused_and_so_is_a_condition_without_samples(
    tmp_path: Path, photos: Path
) -> None:
    with pytest.raises(ConfigError, match="lies in the workspace"):
        dry_run.dry_run(load(tmp_path), sheet=tmp_path / "work" / "probe.png", quiet=True)
    with pytest.raises(ConfigError, match="--only ingest first"):
        dry_run.dry_run(load(tmp_path), where="true", quiet=True)
    with pytest.raises(ConfigError, match="never ingested"):
        dry_run.dry_run(load(tmp_path), steps=("label",), quiet=True)
    assert not (tmp_path / "work").exists()


def test_a_selection_is_probed_and_packed_rows_are_read(tmp_path: Path, photos: Path) -> None:
    config = load(tmp_path, "corpora.photos.pack=true", "corpora.photos.modalities={palette: {tokens: false}}")
    job.run(config, steps=("ingest",), quiet=True)
    for photo in photos.glob("*.jpg"):
        photo.unlink()
    left = tree(tmp_path / "work")
    sheet = tmp_path / "probe.png"
    where = "source IN ('photo000.jpg', 'photo001.jpg')"
    text = dry_run.dry_run(config, steps=("label",), where=where, sheet=sheet, quiet=True)
    assert any("palette" in line and " missing" in line for line in text)
    # Only the rows picked are labeled, so only these cost.
    assert [line.split()[3] for line in text if " palette " in line and "missing" not in line] == ["2"]
    assert text[-1].startswith("what of it has the rows picked already")
    assert tree(tmp_path / "work") == left
    with Catalog.open(tmp_path / "work") as catalog:
        assert catalog.sql("FROM failures").num_rows == 0


def test_a_crop_that_is_added_is_a_share_of_its_samples(tmp_path: Path, photos: Path) -> None:
    job.run(load(tmp_path), quiet=True)
    config = load(tmp_path, "corpora.photos.crops=5")
    with Catalog.open(tmp_path / "work") as catalog:
        fitted = {"edges": catalog.tokenizer("edges")}
        planned = corpus_plan(config, "photos", str(tmp_path / "photos"), fitted)
        (asked,) = labeling.jobs(catalog, {"photos": planned}, config.engine, Wanted())
    assert (asked.parts, asked.rows, asked.shards) == (3, 9, 9)
    assert asked.samples_by_form == {"edges/token": pytest.approx(9 * 3 / 5)}


def test_the_trainer_file_and_the_cluster_are_looked_for(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1 is out of reach"):
        dry_run.dry_run(load(tmp_path, "engine.runner=ray", "engine.ray_address='127.0.0.1:1'"), quiet=True)
    with pytest.raises(UserError, match=r"'foo' is no address of a Ray cluster; expected HOST:PORT"):
        dry_run.dry_run(load(tmp_path, "engine.runner=ray", "engine.ray_address=foo"), quiet=True)
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        dry_run.dry_run(load(tmp_path, "train=nowhere.yaml"), quiet=True)


def test_spans_and_sizes_are_readable() -> None:
    assert [units.size(size) for size in (12, 1234, 5.5e9, 3e15)] == ["12 B", "1.23 kB", "5.5 GB", "3,000 TB"]
    assert [units.span(seconds) for seconds in (5, 3723, 3 * 86400 + 7200)] == ["0:00:05", "1:02:03", "3 d 2 h"]
    cost = costs.Cost(hours=12.345, size_bytes=1e9, on_gpu=True)
    assert cost.words(2.0) == "12.35 GPU-hours, 1 GB written, 24.69 dollars"
    assert cost.wall(10) == "1:14:04 at 10 workers"


def test_what_a_filter_left_out_is_not_new_again(tmp_path: Path, photos: Path) -> None:
    sheet = tmp_path / "probe.png"
    config = load(
        tmp_path, "corpora.photos.filter.min_side=220", "corpora.photos.modalities={palette: {tokens: false}}"
    )
    text = dry_run.dry_run(config, sheet=sheet, quiet=True)
    assert "before the filter (min_side)" in text[0]
    assert job.run(config, steps=("ingest",), quiet=True).counts["dropped_samples"] > 0
    text = dry_run.dry_run(config, sheet=sheet, quiet=True)
    assert text[0].endswith("samples in the source, 0 to be ingested")


def test_a_sheet_that_cannot_be_written_costs_no_plan(tmp_path: Path, photos: Path) -> None:
    config = load(tmp_path, "corpora.photos.modalities={palette: {tokens: false}}")
    (tmp_path / "file").write_text("no folder")
    text = dry_run.dry_run(config, sheet=tmp_path / "file" / "probe.png", quiet=True)
    assert any(line.startswith("in all: ") for line in text)
    assert "start from another folder" in "\n".join(text)
