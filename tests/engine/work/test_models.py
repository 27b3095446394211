"""The models of a worker: loaded once, measured, let go; and neural labelers through a whole run."""

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from benchmarks.engine.weights import depth_tiny, dinov2_tiny
from engine.pipeline import config as pipeline
from engine.plan import corpus, weights
from engine.plan.corpus import LabelerUse
from engine.run import job
from engine.work import models
from engine.work.models import Models
from labelers import pretrained
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError
from modmill import LabelerSpec

MEBIBYTE = 2**20


class Weighty:
    """A labeler of one module, of as many MiB as asked for."""

    spec: ClassVar[LabelerSpec] = LabelerSpec(name="weighty", version=1, scope="crop", outputs=("edges",))

    def __init__(self, mebibytes: int = 1) -> None:
        self.net = torch.nn.Linear(MEBIBYTE // 4, mebibytes, bias=False)
        # A module with two names is one module.
        self.same = self.net

    def label(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"edges": self.net(torch.zeros(1, MEBIBYTE // 4))}


def use(mebibytes: int) -> LabelerUse:
    return LabelerUse(name=f"{__name__}:Weighty", parameters={"mebibytes": mebibytes}, outputs=())


def test_models_are_loaded_once_and_measured() -> None:
    held = Models("cpu", 100 * MEBIBYTE)
    first = held.labeler(use(2))
    assert held.labeler(use(2)) is first
    assert held.held == {corpus.identity(use(2))}
    assert held.bytes_of(corpus.identity(use(2))) == 2 * MEBIBYTE
    assert held.load_s > 0


def test_the_least_recently_used_go() -> None:
    held = Models("cpu", 4 * MEBIBYTE)
    for size in (1, 2):
        held.labeler(use(size))
    held.labeler(use(1))
    held.labeler(use(3))
    assert held.held == {corpus.identity(use(1)), corpus.identity(use(3))}
    # One that is larger than the limit is held alone.
    held.labeler(use(6))
    assert held.held == {corpus.identity(use(6))}
    # Its size is known now, so room is made before it is loaded again.
    held.labeler(use(1))
    held.labeler(use(6))
    assert held.held == {corpus.identity(use(6))}


class Late:
    """A labeler that imports as it is loaded and as it is called; tells how many threads do so at once."""

    spec: ClassVar[LabelerSpec] = LabelerSpec(name="late", version=1, scope="crop", outputs=("edges",))
    at_once: ClassVar[list[int]] = []
    _importing: ClassVar[int] = 0
    _met: ClassVar[threading.Event] = threading.Event()

    def __init__(self, number: int) -> None:
        self._import()

    def label(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        self._import()
        return {}

    @classmethod
    def _import(cls) -> None:
        cls._importing += 1
        cls.at_once.append(cls._importing)
        if cls._importing > 1:
            cls._met.set()
        cls._met.wait(0.05)  # Long enough for another thread to come, if it may.
        cls._importing -= 1


def test_the_workers_of_a_process_import_by_turns() -> None:
    def work(number: int) -> None:
        wanted = LabelerUse(name=f"{__name__}:Late", parameters={"number": number}, outputs=())
        labeler = Models("cpu", MEBIBYTE).labeler(wanted)
        with models.first_call(f"late {number}"):
            labeler.label({})

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert Late.at_once == [1] * 8


def test_a_package_that_is_not_whole_is_not_the_checkpoints_fault(tmp_path: Path) -> None:
    folder = depth_tiny(tmp_path / "depth")
    with pytest.raises(ImportError, match=r"transformers .* does not give AutoModelForNothing"):
        pretrained.load(str(folder), "AutoModelForNothing", ("depth_anything", "dpt"), "cpu")


def test_computing_is_without_gradients_and_in_the_dtype_asked_for() -> None:
    with Models("cpu", MEBIBYTE).computing():
        assert use_net() == (torch.float32, False)
    with Models("cpu", MEBIBYTE, dtype="bfloat16").computing():
        assert use_net() == (torch.bfloat16, False)
    assert Models("cuda:1", 0).dtype == "bfloat16"
    assert Models("cuda", 0, dtype="float16").dtype == "float16"
    assert Models("mps", 0).dtype == "float32"


def use_net() -> tuple[torch.dtype, bool]:
    made = torch.nn.Linear(2, 2)(torch.zeros(1, 2))
    return made.dtype, made.requires_grad


def test_where_the_weights_lie_is_no_part_of_the_identity(tmp_path: Path) -> None:
    here = LabelerUse(name="dpt", parameters={"checkpoint": "/here"}, outputs=(), weights="a" * 64)
    there = replace(here, parameters={"checkpoint": "/there"})
    assert corpus.identity(here) == corpus.identity(there)
    assert corpus.identity(here) != corpus.identity(replace(here, weights="b" * 64))


def test_weights_must_be_those_of_the_plan(tmp_path: Path) -> None:
    folder = depth_tiny(tmp_path / "depth")
    found = weights.resolve(str(folder))
    wanted = LabelerUse(name="dpt", parameters={"checkpoint": str(folder)}, outputs=(), weights=found.digest)
    held = Models("cpu", MEBIBYTE)
    assert held.labeler(wanted).label({"image": [np.zeros((30, 40, 3), np.uint8)]})["depth"][0].shape == (84, 112)
    with pytest.raises(ConfigError, match="expected 000000000000"):
        held.labeler(replace(wanted, weights="0" * 64))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(ConfigError, match="cut short"):
        Models("cpu", MEBIBYTE).labeler(wanted)


PIPELINE = """
workspace: work
corpora:
  photos:
    source: photos
    part_rows: 8
    modalities:
      benchmarks.engine.weights:TINY_MAP: {parameters: {checkpoint: PLACE/tiny}}
      benchmarks.engine.weights:TINY_GLOBAL: {parameters: {checkpoint: PLACE/tiny}, keep: true}
      depth: {labeler: dpt, parameters: {checkpoint: PLACE/depth}, keep: true, tokens: false}
tokenizers: {"benchmarks.engine.weights:TINY_MAP": {steps: 4, batch: 4, codebook: 32, width: 16, latent: 8}}
fit_rows: 8
engine: {runner: local, workers: 1, batch: 4}
"""


def test_a_run_with_weights_is_stale_by_their_digest_alone(tmp_path: Path, photos: Path) -> None:
    dinov2_tiny(tmp_path / "first/tiny")
    depth_tiny(tmp_path / "first/depth")
    file = tmp_path / "pipeline.yaml"

    def run(place: str) -> int:
        file.write_text(PIPELINE.replace("PLACE", place))
        return job.run(pipeline.load(file), quiet=True).counts.get("shards", 0)

    assert run("./first") == 6
    with Catalog.open(tmp_path / "work") as catalog:
        found = catalog.sql("SELECT DISTINCT modality, form, ok, failed FROM shards ORDER BY ALL").to_pylist()
        rows = catalog.sql("SELECT modality, weights FROM recipes WHERE form = 'label'").to_pylist()
        digests = {row["modality"]: row["weights"] for row in rows}
    assert {(row["modality"], row["form"]) for row in found} == {
        ("tiny_map", "token"),
        ("tiny_global", "label"),
        ("depth", "label"),
    }
    assert {row["failed"] for row in found} == {0}
    assert digests == {
        "tiny_global": weights.resolve(str(tmp_path / "first/tiny")).digest,
        "depth": weights.resolve(str(tmp_path / "first/depth")).digest,
    }

    (tmp_path / "first").rename(tmp_path / "second")
    assert run("second") == 0
    depth_tiny(tmp_path / "second/depth", seed=1)
    assert run("second") == 2
