"""What is to be done: parts that lack shards, lazily and in order; why, in words."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.pipeline import config as pipeline
from engine.plan import missing, reasons
from engine.plan.corpus import CorpusPlan, corpus_plan
from engine.plan.groups import groups
from engine.plan.missing import Wanted
from engine.run import labeling
from manifests.catalog.catalog import Catalog
from manifests.log import entries as log
from manifests.log.actions import Action, CorpusAdded, PartAdded, RecipeAdded, ShardAdded
from manifests.queries import planning
from manifests.store.storage import open_storage
from tests.records import part_added, shard_added

PIPELINE = """
workspace: {folder}/work
corpora:
  photos:
    source: photos
    crops: 2
    modalities: {{rgb: {{keep: true, tokens: false}}, palette: {{tokens: false}}, caption: {{tokens: false}}}}
engine: {{pools: {{other: {{labelers: [palette]}}}}}}
"""
PARTS = 5000


def part(number: int) -> PartAdded:
    return part_added(number, rows=10)


def shard(planned: CorpusPlan, number: int, modality: str, crop: int | None = None, **changed) -> ShardAdded:
    facts = {
        "fingerprint": planned.modalities[modality].label.fingerprint,
        "ok": 10,
        "failed": 0,
        "not_selected": 0,
        **changed,
    }
    return shard_added(number, modality=modality, crop=crop, rows=10, **facts)


def load(folder: Path, *overrides: str) -> tuple[pipeline.PipelineConfig, CorpusPlan]:
    file = folder / "pipeline.yaml"
    file.write_text(PIPELINE.format(folder=folder))
    config = pipeline.load(file, overrides)
    return config, corpus_plan(config, "photos", "photos", {})


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    storage = open_storage(tmp_path / "work")
    log.create_workspace(storage)
    with Catalog(storage) as catalog:
        corpus = CorpusAdded(corpus="photos", kind="image", source="photos", seed=0, part_rows=10, config={})
        catalog.commit([corpus, *(part(number) for number in range(PARTS))], run="r")
        yield catalog


def items(catalog: Catalog, config: pipeline.PipelineConfig, planned: CorpusPlan, wanted: Wanted | None = None):
    wanted = wanted or Wanted()
    found = labeling.jobs(catalog, {"photos": planned}, config.engine, wanted)
    return labeling.items(catalog, found, {}, wanted)


def test_all_is_missing_group_by_group_and_pools_by_turns(tmp_path: Path, catalog: Catalog) -> None:
    config, planned = load(tmp_path)
    found = list(items(catalog, config, planned))
    assert len(found) == 2 * PARTS == len({item.name for item in found})
    assert [item.pool for item in found[:4]] == ["", "other", "", "other"]
    for pool, modalities in (("", ["rgb", "rgb", "caption"]), ("other", ["palette"])):
        of_pool = [item for item in found if item.pool == pool]
        assert [item.part.part for item in of_pool] == list(range(PARTS))
        assert [target.modality for target in of_pool[-1].targets] == modalities


def test_the_decoders_version_rises_for_the_containers_concerned_alone(tmp_path: Path) -> None:
    config, before = load(tmp_path)
    inputs = {}
    for suffixes in ((".jpg", ".png", ".jpeg"), (".jpg", ".tif"), (".tiff",)):
        planned = corpus_plan(config, "photos", "photos", {}, suffixes)
        inputs[suffixes] = planned.modalities["rgb"].label.inputs["image"]
        # A caption is made of no pixels.
        assert planned.modalities["caption"] == before.modalities["caption"]
    assert list(inputs.values()) == ["decoder-1", "decoder-1-tiff2", "decoder-1-tiff2"]
    assert before.modalities["rgb"].label.inputs["image"] == "decoder-1"


def test_only_what_is_missing_is_planned_and_only_as_it_is_taken(tmp_path: Path, catalog: Catalog) -> None:
    config, planned = load(tmp_path)
    done: list[Action] = []
    for number in range(PARTS):
        done += [shard(planned, number, "caption"), shard(planned, number, "palette"), shard(planned, number, "rgb", 0)]
        done += [shard(planned, number, "rgb", 1)] * (number not in (3, 4000))
    catalog.commit(done, run="r")
    found = labeling.jobs(catalog, {"photos": planned}, config.engine, Wanted())
    assert [(job.parts, job.rows, job.shards) for job in found] == [(2, 20, 2)]
    assert [use.name for use, _ in found[0].rows_by_labeler] == ["rgb"]
    stream = labeling.items(catalog, found, {}, Wanted())
    first = next(stream)
    assert [(target.modality, target.crop) for target in first.targets] == [("rgb", 1)]
    # What comes to be there after the first window was looked at is not made again.
    catalog.commit([shard(planned, 4000, "rgb", 1)], run="r")
    assert (first.part.part, list(stream)) == (3, [])


def test_rows_that_were_left_out_are_made_and_failed_ones_when_asked(tmp_path: Path, catalog: Catalog) -> None:
    config, planned = load(tmp_path)
    done: list[Action] = [shard(planned, number, "palette") for number in range(PARTS)]
    left_out = shard(planned, 7, "palette", ok=4, not_selected=6)
    failed = shard(planned, 8, "palette", ok=9, failed=1)
    catalog.commit([*done, left_out, failed], run="r")
    (group,) = (group for group in groups(planned, config.engine) if group.pool == "other")
    (target,) = missing.group_targets(planned, group)
    (item,) = missing.work_items(catalog, planned, group, {}, Wanted())
    assert (item.part.part, item.base[target].ok, item.selected) == (7, 4, None)
    again = list(missing.work_items(catalog, planned, group, {}, Wanted(retry=frozenset())))
    assert [(item.part.part, item.base[target].ok) for item in again] == [(7, 4), (8, 9)]
    assert {
        row["part"] for row in catalog.sql("SELECT part FROM missing WHERE modality = 'palette'").to_pylist()
    } == set()


def test_the_reason_names_the_input_that_changed(tmp_path: Path, catalog: Catalog) -> None:
    _, before = load(tmp_path)
    old = before.modalities["palette"].label
    done: list[Action] = [shard(before, number, "palette") for number in range(20)]
    done += [shard(before, number, "rgb", 0) for number in range(PARTS)]
    failing = shard(before, 30, "caption", ok=8, failed=2)
    catalog.commit([RecipeAdded(fingerprint=old.fingerprint, document=old.document()), *done, failing], run="r")
    _, now = load(tmp_path, "corpora.photos.modalities.palette.parameters={colors: 5}")
    lines = {line.modality: line for line in reasons.lines(catalog, now, Wanted())}
    assert lines["palette"].to_do == PARTS
    assert "20 stale (parameters.colors 7 → 5)" in lines["palette"].why
    assert f"{PARTS - 20:,} missing" in lines["palette"].why
    assert lines["rgb"].why == f"{PARTS:,} miss crops"
    assert lines["caption"].why == f"{PARTS - 1:,} missing, 2 failed rows stay (--failed)"
    assert len(reasons.table(list(lines.values()))) == 4
    document = {**old.document(), "version": old.version - 1, "inputs": {"image": "decoder-0"}}
    assert reasons.changes(old.document(), document, {}) == [
        f"version {old.version - 1} → {old.version}",
        f"image decoder-0 → {old.inputs['image']}",
    ]


def test_counts_of_an_empty_corpus_are_nothing(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "work")
    log.create_workspace(storage)
    config, planned = load(tmp_path)
    with Catalog(storage) as catalog:
        assert planning.last_part(catalog, "photos") == -1
        assert list(items(catalog, config, planned)) == []
        assert [line.to_do for line in reasons.lines(catalog, planned, Wanted())] == [0, 0, 0]
