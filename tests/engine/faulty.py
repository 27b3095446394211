"""Work items without a run, and labelers that go wrong in every way a labeler can."""

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.ingest import ingest
from engine.pipeline.config import PipelineConfig
from engine.plan.corpus import CorpusPlan, corpus_plan
from engine.plan.items import Attempt, WorkItem
from engine.plan.missing import wanted_targets
from engine.work.inputs import WorkerSettings
from engine.work.worker import Worker
from manifests.catalog.catalog import Catalog
from manifests.log import entries as log
from manifests.log.lease import writer_lease
from manifests.store.storage import Storage, open_storage
from modmill import LabelerSpec

SETTINGS = WorkerSettings(threads=1, batch=4, decode_threads=2, queue_bytes=64 << 20, device="cpu", run="run-1")
RED = (250, 5, 5)


def item_of(workspace: Path, source: Path, modalities: Mapping[str, Any], **corpus: Any) -> WorkItem:
    """The item that makes all of the first part of a corpus, which is ingested where it is not yet."""
    document = {
        "workspace": str(workspace),
        "corpora": {"photos": {"source": str(source), "modalities": dict(modalities), **corpus}},
    }
    config = PipelineConfig.model_validate(document)
    storage = open_storage(workspace)
    log.create_workspace(storage)
    with writer_lease(storage, "run-1") as lease, Catalog(storage, lease=lease) as catalog:
        found = ingest.ingest(catalog, "photos", config.corpora["photos"], run="run-1")
        part = catalog.parts("photos")[0]
    plan: CorpusPlan = corpus_plan(config, "photos", found.root, {})
    return WorkItem(plan=plan, part=part, targets=tuple(wanted_targets(plan)), tokenizers={}, group="light")


def worker_of(workspace: Path, **settings: Any) -> Worker:
    return Worker(str(workspace), replace(SETTINGS, **settings))


def attempt(item: WorkItem, **facts: Any) -> WorkItem:
    return replace(item, attempt=Attempt(**facts))


def files(storage: Storage | Path, *, hidden: bool = False) -> dict[str, bytes]:
    """The shards and failed files of a workspace by path, without samples and sidecars."""
    storage = storage if isinstance(storage, Storage) else open_storage(storage)
    found = (file.path for file in storage.walk("data"))
    wanted = [path for path in found if "/_" not in path and not path.endswith(".json")]
    return {path: storage.read(path) for path in wanted if path.rpartition("/")[2].startswith(".") is hidden}


def is_red(image: np.ndarray) -> bool:
    """Whether a picture is the one that the labelers below stumble over."""
    return bool(np.abs(image[len(image) // 2, image.shape[1] // 2].astype(int) - RED).max() < 30)


class Faulty:
    """Labels crops with their own pixels, but for pictures that are red, or for all: `how` says what it does then.

    `log` is a file that gets a line for each call: how many rows it had, and how many of them were not blank.
    """

    spec = LabelerSpec(name="tests.engine.faulty:Faulty", version=1, scope="crop", outputs=("rgb",))

    def __init__(self, how: str = "", most: int = 1_000_000, log: str = "") -> None:
        self.how, self.most, self.log = how, most, log

    def label(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        images = batch["image"]
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{len(images)} {int(images.any(axis=(1, 2, 3)).sum())}\n")
        if len(images) > self.most:
            raise MemoryError(f"{len(images)} rows are too many")
        red = [place for place, image in enumerate(images) if is_red(image)]
        labels = list(images)
        match self.how:
            case "raise all":
                raise RuntimeError("cannot label anything")
            case "short":
                return {"rgb": labels[: len(labels) // 2]}
            case "wrong shape":
                return {"rgb": [image[:10] for image in images]}
            case "raise" if red:
                raise RuntimeError("cannot label red")
            case "hang" if red:
                time.sleep(60)
            case "kill" if red:
                os._exit(9)
            case "tensor":
                import torch

                return {"rgb": torch.from_numpy(images.copy())}
        return {"rgb": labels}


class Maps:
    """Normals of crops as one torch tensor; not finite where the picture is red."""

    spec = LabelerSpec(name="tests.engine.faulty:Maps", version=1, scope="crop", outputs=("normals",))

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def label(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        import torch

        normals = torch.from_numpy(batch["image"].copy()).to(self.device).float() / 255
        normals[[place for place, image in enumerate(batch["image"]) if is_red(image)], 3, 3] = float("nan")
        return {"normals": normals.to(torch.bfloat16)}


class Photos:
    """Captions of photographs that say how many there were in the call, and the size of each."""

    spec = LabelerSpec(name="tests.engine.faulty:Photos", version=1, scope="image", outputs=("caption",), batch=3)

    def label(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        together = len(batch["image"])
        assert together <= self.spec.batch
        if any(is_red(image) for image in batch["image"]):
            raise RuntimeError("cannot caption red")
        return {
            "caption": [
                f"{image.shape[1]}x{image.shape[0]} of {width}x{height} in {together}"
                for image, (width, height) in zip(batch["image"], batch["size"], strict=True)
            ]
        }
