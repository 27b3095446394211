"""Which labelers share a decode: pools, heavy ones, models that do not fit together, inputs."""

from dataclasses import replace
from pathlib import Path

import pytest

from engine.pipeline import config as pipeline
from engine.plan.corpus import CorpusPlan, corpus_plan
from engine.plan.groups import Group, groups

LABELERS = """
from modmill import LabelerSpec


class Heavy:
    spec = LabelerSpec(name="own_labelers:Heavy", version=1, scope="image", outputs=("depth",), heavy=True)

    def __init__(self, seed: int = 0) -> None:
        pass

    def label(self, batch):
        raise NotImplementedError


class FromDepth:
    spec = LabelerSpec(
        name="own_labelers:FromDepth", version=1, scope="image", outputs=("normals",), inputs=("image", "depth")
    )

    def __init__(self) -> None:
        pass

    def label(self, batch):
        raise NotImplementedError
"""


@pytest.fixture
def plan_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_labelers.py").write_text(LABELERS)
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(modalities: str, engine: str = "{}") -> tuple[CorpusPlan, pipeline.EngineConfig]:
        file = tmp_path / "pipeline.yaml"
        file.write_text(
            f"workspace: work\ncorpora:\n  photos: {{source: photos, modalities: {modalities}}}\nengine: {engine}\n"
        )
        config = pipeline.load(file)
        return corpus_plan(config, "photos", "photos", {}), config.engine

    return make


def sized(plan: CorpusPlan, sizes: dict[str, int]) -> CorpusPlan:
    return replace(plan, labelers=tuple(replace(use, model_bytes=sizes[use.name]) for use in plan.labelers))


def makes(found: list[Group]) -> list[tuple[str, str, list[str]]]:
    return [(group.name, group.pool, sorted(group.modalities)) for group in found]


def test_light_labelers_share_one_group_without_a_name(plan_of) -> None:
    plan, engine = plan_of("[rgb, edges, metadata, palette, caption]")
    found = groups(plan, engine)
    assert makes(found) == [("", "", ["caption", "edges", "metadata", "palette", "rgb"])]


def test_a_heavy_labeler_and_a_pool_stand_apart(plan_of) -> None:
    plan, engine = plan_of(
        "{rgb: {}, edges: {}, palette: {}, depth: {labeler: 'own_labelers:Heavy'}}",
        "{pools: {other: {labelers: [palette]}}}",
    )
    found = groups(plan, engine)
    assert makes(found) == [
        ("light", "", ["edges", "rgb"]),
        ("palette", "other", ["palette"]),
        ("depth", "", ["depth"]),
    ]


def test_models_that_do_not_fit_together_are_parted(plan_of) -> None:
    plan, engine = plan_of("[rgb, edges, palette]", "{models_mb: 100}")
    sizes = {"rgb": 60 << 20, "edges": 60 << 20, "palette": 30 << 20}
    found = groups(sized(plan, sizes), engine)
    assert [sorted(group.modalities) for group in found] == [["palette", "rgb"], ["edges"]]
    assert [group.model_bytes >> 20 for group in found] == [90, 60]
    assert len({group.name for group in found}) == 2


def test_a_labeler_goes_where_its_input_is_unless_that_is_heavy(plan_of) -> None:
    plan, engine = plan_of("[metadata, palette, caption]", "{models_mb: 100}")
    # Metadata count words of captions.
    sizes = {"metadata": 60 << 20, "palette": 30 << 20, "caption": 60 << 20}
    together = next(group for group in groups(sized(plan, sizes), engine) if group.model_bytes > 100 << 20)
    assert sorted(together.modalities) == ["caption", "metadata"]
    plan, engine = plan_of("{normals: {labeler: 'own_labelers:FromDepth'}, depth: {labeler: 'own_labelers:Heavy'}}")
    assert makes(groups(plan, engine)) == [("depth", "", ["depth"]), ("normals", "", ["normals"])]


def test_a_labeler_that_only_serves_others_makes_no_group(plan_of) -> None:
    plan, engine = plan_of(
        "{normals: {labeler: 'own_labelers:FromDepth'}, edges: {}}", "{pools: {other: {labelers: [files]}}}"
    )
    assert "depth" in {output.name for use in plan.labelers for output in use.outputs}
    assert makes(groups(plan, engine)) == [("", "", ["edges", "normals"])]
