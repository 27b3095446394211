"""The pieces of `benchmarks.engine` at a small size: they run, count what they say, and agree with each other."""

import ast
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from benchmarks.engine import (
    bare,
    inputs,
    measures,
    memory,
    raydata,
    runs,
)
from benchmarks.engine.bench import Bench
from manifests.formats import shards

BENCHMARK = Path(bare.__file__).with_name("__main__.py")
GOALS = {
    *(
        "engine_over_bare_tiny",
        "engine_over_bare_dinov2",
        "light_over_loop",
        "light_ms_per_image",
        "fused_over_separate",
    ),
    *("over_ray_data_light", "over_ray_data_neural", "driver_efficiency_64", "driver_ms_per_item", "driver_mb_growth"),
    *("worker_rss_mb_max", "worker_rss_slope_mb_per_100_parts"),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return inputs.make_images(tmp_path_factory.mktemp("bench") / "images", 12, sides_px=(80, 120))


@pytest.fixture(scope="module")
def pipeline(images: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("run")
    source = inputs.folder_of(images, folder / "source")
    return inputs.pipeline(
        source, folder / "workspace", measures.LIGHT, part_rows=3, runner="local", workers=1, device="cpu"
    )


def test_the_images_are_the_same_again(images: list[Path], tmp_path: Path) -> None:
    again = inputs.make_images(tmp_path / "again", 12, sides_px=(80, 120))
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in images]
    assert sum(path.with_suffix(".txt").exists() for path in images) == 6


def test_the_loop_makes_what_the_engine_makes(images: list[Path], pipeline: dict, tmp_path: Path) -> None:
    looped = bare.light_loop(images, tmp_path)
    assert looped["rows"] == 12
    assert looped["wall_s"] > 0
    figures = runs.run(pipeline, workers=1)
    # Of four parts the first is the start.
    assert (figures["rows"], figures["cpu_rows"]) == (9, 12)
    assert figures["wall_s"] > 0
    with open(tmp_path / "rgb.tar", "rb") as file:
        by_loop = shards.read_tar(file).values
    ours = []
    for path in sorted(Path(pipeline["workspace"], "data", "photos", "rgb").rglob("*.tar")):
        with open(path, "rb") as file:
            ours += shards.read_tar(file).values
    assert {bytes(value) for value in by_loop} == {bytes(value) for value in ours}


def test_milliseconds_of_each_function(images: list[Path]) -> None:
    spent = bare.light_functions_ms(images[:2], repeats=1)
    assert set(spent) == {*bare.LIGHT, "decode", "crop"}
    assert all(0 <= ms < 1000 for ms in spent.values())


def test_a_worker_s_memory_is_sampled(pipeline: dict, tmp_path: Path) -> None:
    figures = memory.slope_mb_per_100_parts({**pipeline, "workspace": str(tmp_path / "workspace")})
    assert figures["parts"] == 4
    assert figures["rss_mb_last"] > 20


def test_the_median_of_ratios_after_a_warm_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "SIDES_PX", (20, 30))
    bench = Bench(tmp_path, scale=0.01, rounds=3)
    said: list[str] = []
    bench.say = said.append
    ours = iter([99.0, 2.0, 1.0, 4.0])
    ratio = bench.compare(
        "name", lambda: {"wall_s": next(ours), "rows": 4, "start_s": 7}, lambda: {"wall_s": 1, "rows": 2}
    )
    assert ratio == 1.0
    assert bench.starts_s == {"name": 7}
    assert said[0].startswith("name ")


def test_the_functions_that_ray_data_is_given_label_a_batch(images: list[Path]) -> None:
    pixels = [cv2.imread(str(path))[..., ::-1] for path in images[:2]]
    made = raydata.Light()({"path": [str(path) for path in images[:2]], "image": pixels})
    assert made["key"] == ["00000", "00001"]
    assert all(len(values) == 2 for values in made.values())
    assert cv2.imdecode(np.frombuffer(made["rgb"][0], np.uint8), cv2.IMREAD_COLOR).shape == (224, 224, 3)


def test_every_goal_is_measured_and_explained() -> None:
    assert set(measures.MEASURES) == {"light", "neural", "neural_on_ray", "dinov2", "fused", "driver", "memory"}
    document = ast.get_docstring(ast.parse(BENCHMARK.read_text())) or ""
    assert {word for word in re.findall(r"\w+", document) if word in GOALS} == GOALS
