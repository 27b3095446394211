"""The questions of docs/quality.md have answers, and it tells of every figure that a run makes."""

import re
from pathlib import Path

import numpy as np
import pytest

from engine.pipeline import config as pipeline
from engine.run import job
from manifests.catalog.catalog import Catalog

PAGE = (Path(__file__).parents[4] / "docs/quality.md").read_text()
QUESTIONS = re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)
PIPELINE = """
workspace: {folder}/work
corpora:
  photos:
    source: {photos}
    part_rows: 8
    modalities: [rgb, edges, boxes, instances, metadata, palette, caption]
modalities: {{edges: {{keep: true, tokens: false}}, instances: {{tokens: false}}}}
tokenizers: {{rgb: {{steps: 2, batch: 4, codebook: 32, width: 16}}}}
fit_rows: 16
engine: {{runner: local, workers: 1, batch: 4}}
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, make_photos) -> Path:
    folder = tmp_path_factory.mktemp("quality")
    photos = make_photos(folder / "photos", 17)
    (folder / "pipeline.yaml").write_text(PIPELINE.format(folder=folder, photos=photos))
    job.run(pipeline.load(folder / "pipeline.yaml"), quiet=True)
    return folder / "work"


def test_a_run_measures_what_it_makes(workspace: Path) -> None:
    with Catalog.open(workspace) as catalog:
        rows = catalog.fetch("SELECT modality, form, metric, value FROM quality WHERE part = 0")[1]
        found: dict[tuple[str, str], dict[str, float]] = {}
        for modality, form, metric, value in rows:
            found.setdefault((modality, form), {})[metric] = value
        of_rgb = found["rgb", "token"]
        assert 0 < of_rgb["entropy_bits"] <= 5
        assert 0 < of_rgb["codebook_use"] <= 1
        # Pixels are not kept, and measured behind their tokens.
        assert 50 < of_rgb["label_mean"] < 200
        assert "flat" in found["edges", "label"]
        assert "label_flat" not in found["boxes", "token"]
        assert found["boxes", "label"]["records"] > 0
        assert found["metadata", "label"]["mean_original_width"] > 180
        assert found["caption", "label"]["words"] > 3
        # Whatever the batches were, the record says what a look at the whole part says.
        for shard in catalog.live_shards():
            assert shard.metrics, (shard.modality, shard.form)


def test_modalities_of_one_item_are_compared_in_a_run(tmp_path: Path) -> None:
    import cv2

    # A floor that falls away: depth grows upwards in the picture, and its normal looks up and towards the camera.
    v = (np.arange(224) - 111.5) / 224
    depth = np.repeat((1 / (v + 1))[:, None], 224, axis=1).astype(np.float32)
    normal = np.array([0, -1, -1]) / 2**0.5
    (tmp_path / "photos").mkdir()
    for name in ("one", "two"):
        cv2.imwrite(str(tmp_path / f"photos/{name}.png"), np.full((224, 224, 3), len(name), np.uint8))
        np.save(tmp_path / f"photos/{name}.depth.npy", depth)
        np.save(tmp_path / f"photos/{name}.normals.npy", np.tile(normal, (224, 224, 1)).astype(np.float32))
    made = "{{keep: true, tokens: false, parameters: {{path: '{{stem}}.{0}.npy'}}}}"
    (tmp_path / "pipeline.yaml").write_text(
        "workspace: work\ncorpora: {photos: {source: photos, modalities: {"
        f"depth: {made.format('depth')}, normals: {made.format('normals')}}}}}}}\n"
        "engine: {runner: local, workers: 1, batch: 2}\n"
    )
    job.run(pipeline.load(tmp_path / "pipeline.yaml"), quiet=True)
    with Catalog.open(tmp_path / "work") as catalog:
        rows = catalog.fetch("SELECT modality, value FROM quality WHERE metric = 'agreement_with_depth'")[1]
    assert [(modality, value > 0.99) for modality, value in rows] == [("normals", True)]


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_questions_have_answers(question: str, workspace: Path) -> None:
    with Catalog.open(workspace) as catalog:
        columns, rows = catalog.fetch(question)
    assert columns
    assert rows or "alarms" in question or "value > 0.01" in question


def test_every_figure_is_told_of(workspace: Path) -> None:
    told = {word for line in PAGE.splitlines() for word in re.findall(r"`(\w+)`", line)}
    with Catalog.open(workspace) as catalog:
        metrics = {metric for (metric,) in catalog.fetch("SELECT DISTINCT metric FROM quality")[1]}
    bare = {metric.removeprefix("label_") for metric in metrics}
    bare = {"mean_FIELD" if name.startswith("mean_") else name for name in bare if not name.startswith("score_hist_")}
    assert bare <= told, bare - told


def test_the_limits_of_the_page_are_those_of_the_alarms(workspace: Path) -> None:
    with Catalog.open(workspace) as catalog:
        (limits,) = catalog.sql("SELECT * FROM state.alarm_limit").to_pylist()
    assert (
        f"from {limits['drift_shards']} shards on, a value is more than {limits['drift_deviations']:g} standard" in PAGE
    )
    assert (
        f"at least {limits['least_deviation']:g} + {limits['least_relative_deviation']:.0%}".replace("%", " %") in PAGE
    )
    assert f"less than {limits['least_relative_rows']:g} of the usual number of rows" in PAGE
    assert limits["collapse"] == 0.5
    assert f"from {limits['jump_shards']} shards on, `null_share` is more than {limits['null_jump']:g} above" in PAGE
    assert f"a shard of {limits['equal_rows']} rows or more has one value" in PAGE
