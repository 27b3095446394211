"""The demo: what it lays out, that its pipeline fits, and a small run of it on Ray."""

import csv
from pathlib import Path

import pytest
import skimage.data

from engine.cli import entry
from engine.ingest.ingest import ingest
from engine.pipeline import config as pipeline
from engine.plan import missing as plan
from engine.plan.corpus import corpus_plan
from engine.sources.listing import key_of
from examples.demo import demo
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError
from manifests.log.entries import create_workspace
from manifests.store.storage import open_storage

SMALL = (
    "fit_rows=12",
    "corpora.photos.crops=1",
    "engine.batch=8",
    "tokenizers.text.vocabulary=5000",
    "snapshots.demo.hold_out=0.4",
    *(
        f"tokenizers.{name}={{steps: 2, batch: 4, codebook: 16, width: 16, depth: 1}}"
        for name in ("rgb", "edges", "depth", "normals", "segmentation")
    ),
)


@pytest.fixture
def laid_out(tmp_path: Path) -> Path:
    demo.lay_out(tmp_path / "out", 3, lambda line: None)
    return tmp_path / "out"


def files(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_photographs_are_copies_of_those_in_the_packages(laid_out: Path):
    packaged = Path(skimage.data.__file__).parent
    photos = laid_out / "sources" / "photos"
    assert (photos / "astronaut.png").read_bytes() == (packaged / "astronaut.png").read_bytes()
    with (laid_out / "sources" / "photographs.csv").open(encoding="utf-8", newline="") as table:
        rows = list(csv.DictReader(table))
    assert {row["file"] for row in rows} == {path.name for path in photos.iterdir()}
    assert all(len(row["caption"].split()) > 4 and row["credit"] for row in rows)
    # The report shows what tokens hold of photographs that no tokenizer was fitted on.
    assert any(plan.is_judged(key_of(row["file"])) for row in rows)


def test_laying_out_again_changes_nothing(laid_out: Path):
    before = files(laid_out)
    demo.lay_out(laid_out, 3, lambda line: None)
    assert files(laid_out) == before


def test_only_what_is_missing_is_laid_out_again(laid_out: Path):
    missing = laid_out / "sources" / "photos" / "coffee.png"
    before = files(laid_out)
    missing.unlink()
    demo.lay_out(laid_out, 3, lambda line: None)
    after = files(laid_out)
    assert after.pop(missing)[0] == before.pop(missing)[0]
    assert after == before


def test_the_pipeline_file_loads_and_plans(laid_out: Path):
    config = pipeline.load(laid_out / "pipeline.yaml")
    pipeline.check_labelers(config)
    assert Path(config.workspace) == laid_out / "workspace"
    storage = open_storage(config.workspace)
    create_workspace(storage)
    with Catalog(storage) as catalog:
        roots = {name: ingest(catalog, name, section, run="test").root for name, section in config.corpora.items()}
        counts = {row["corpus"]: row["samples"] for row in catalog.corpora()}
        captions = catalog.sql("SELECT count(caption) AS n FROM samples WHERE corpus <> 'texts'").to_pylist()[0]["n"]
    assert counts["photos"] >= 16
    assert counts["scenes"] == 3
    assert counts["texts"] >= 60
    assert captions == counts["photos"] + counts["scenes"]
    plans = {name: corpus_plan(config, name, roots[name], {}) for name in config.corpora}
    assert {"depth", "normals", "segmentation", "instances"} < set(plans["scenes"].modalities)
    fits = plan.fit_items(config, plans, lambda corpus: [], refit=False, fitted={})
    assert {item.name for item in fits} == {"rgb", "edges", "depth", "normals", "segmentation", "text"}


def test_a_folder_with_another_pipeline_file_is_left_alone(tmp_path: Path):
    (tmp_path / "pipeline.yaml").write_text("workspace: mine\n")
    with pytest.raises(ConfigError, match="another pipeline's file"):
        demo.run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline.yaml"]


def test_the_pipeline_file_of_a_demo_made_by_the_former_verb_is_ours(laid_out: Path):
    file = laid_out / "pipeline.yaml"
    file.write_text(file.read_text().replace("`make demo`", "`modmill demo`", 1))
    before = files(laid_out)
    demo.lay_out(laid_out, 3, lambda line: None)
    assert files(laid_out) == before


def write_small_trainer_file(out: Path) -> None:
    """The demo's trainer file cut to seconds, where the demo finds it and leaves it as it is."""
    text = demo._trainer_file()
    for long, short in (
        ("steps: 520", "steps: 3"),
        ("{depth: 3, dim: 128, heads: 4}", "{depth: 1}"),
        ("train_batch_size: 16", "train_batch_size: 4"),
    ):
        assert long in text
        text = text.replace(long, short)
    out.mkdir()
    (out / "train.yaml").write_text(text)


@pytest.mark.ray
@pytest.mark.slow
def test_a_small_demo_ends_with_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None, readme_questions: list[list[str]]
):
    monkeypatch.chdir(tmp_path)
    write_small_trainer_file(tmp_path / "demo-out")
    report = demo.run_demo(Path("demo-out"), workers=2, scenes=12, settings=SMALL)
    assert report == Path("demo-out/report.html")
    text = report.read_text()
    assert "modmill sql demo-out/workspace" in text
    assert "Not shown" not in text
    assert "A tiny model" in text
    for name in ("from-captions-to-pictures", "from-pictures-to-all", "one-caption-under-five-palettes"):
        assert (report.parent / "pictures" / f"{name}.png").is_file()
    with Catalog.open("demo-out/workspace") as catalog:
        missing = [row for row in catalog.coverage() if row["parts_missing"] or row["failed"]]
        assert not missing
        shards = catalog.live_shards()
        trained = catalog.sql("SELECT status FROM runs WHERE kind = 'train'").to_pylist()
    assert trained == [{"status": "done"}]
    for question in readme_questions:
        with pytest.raises(SystemExit) as end:
            entry.main(["demo-out/workspace" if word == "W" else word for word in question])
        assert end.value.code == 0, question
    for corpus, name in (("scenes", "depth"), ("scenes", "segmentation"), ("photos", "rgb")):
        assert (report.parent / "pictures" / f"{corpus}-00-{name}-label.png").is_file()
        assert (report.parent / "pictures" / f"{corpus}-00-{name}-tokens.png").is_file()

    report.unlink()
    demo.run_demo(Path("demo-out"), workers=2, scenes=12, settings=SMALL)
    assert report.is_file()
    with Catalog.open("demo-out/workspace") as catalog:
        assert catalog.live_shards() == shards
        assert catalog.sql("SELECT status FROM runs WHERE kind = 'train'").to_pylist() == trained
