"""Does the same work through Ray Data, for `benchmarks.engine`.

`read_images(include_paths=True)` decodes in its read tasks, an actor pool labels batches with the functions that our engine
calls, `write_parquet` writes: pixels as PNG bytes, records as lists of structs. Actors take half a processor each, so
that two of them and a read task fit two processors; blocks are small enough that both have work from the start on.
"""

import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

WORKERS = 2
_BLOCKS = 12
_BATCH = 16


class Light:
    """Labels the light group on decoded photographs: labels, and PNG bytes of those that are pictures."""

    def __init__(self) -> None:
        import cv2

        from benchmarks.engine.bare import light_labelers

        cv2.setNumThreads(1)
        self._loaded = light_labelers()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        from benchmarks.engine.bare import label_image
        from manifests.pixels import images

        keys = [Path(path).stem for path in batch["path"]]
        rows = [label_image(self._loaded, image, key) for image, key in zip(batch["image"], keys, strict=True)]
        return {
            "key": keys,
            **{name: [images.encode_png(row[name]) for row in rows] for name in ("rgb", "edges")},
            **{name: [row[name] for row in rows] for name in ("metadata", "palette")},
            "done_s": [time.time()] * len(keys),
        }


class Neural:
    """Runs a labeler of crops on decoded photographs, in batches of one size; its labels are `.npy` bytes."""

    def __init__(self, labeler: str, parameters: dict[str, Any], modality: str, batch: int) -> None:
        import cv2
        import torch

        from labelers import protocol

        cv2.setNumThreads(1)
        torch.set_num_threads(1)
        self._labeler = protocol.build(protocol.find(labeler), parameters)
        self._modality, self._batch = modality, batch

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        from manifests.pixels import crops, images

        keys = [Path(path).stem for path in batch["path"]]
        cut = np.zeros((self._batch, 224, 224, 3), np.uint8)
        for place, (image, key) in enumerate(zip(batch["image"], keys, strict=True)):
            height, width = image.shape[:2]
            cut[place] = crops.crop_pixels(image, crops.plan_crop(crops.CropRule(), key, 0, width, height), 224)
        made = self._labeler.label({"image": cut})[self._modality]
        return {
            "key": keys,
            "label": [images.encode_npy(np.asarray(made[place])) for place in range(len(keys))],
            "done_s": [time.time()] * len(keys),
        }


def run(paths: Sequence[Path], out: Path, neural: dict[str, Any] | None = None) -> dict[str, float]:
    """Labels the photographs through Ray Data on the Ray that runs; seconds as `runs.run` counts them.

    `neural` holds the arguments of `Neural`; without them the light group is labeled. Wall time goes from the moment when
    the last actor finished its first batch to the end of the write: the start of actors lies before it.
    """
    import logging

    import pyarrow.parquet as pq
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    batch = neural["batch"] if neural else _BATCH
    called = time.time()
    read = ray.data.read_images(
        [str(path) for path in paths], mode="RGB", include_paths=True, override_num_blocks=min(_BLOCKS, len(paths))
    )
    labeled = read.map_batches(
        Neural if neural else Light,
        fn_constructor_kwargs=neural or {},
        batch_size=batch,
        compute=ActorPoolStrategy(size=WORKERS),
        num_cpus=0.5,
    )
    labeled.write_parquet(str(out))
    ended = time.time()
    tables = [
        pq.read_table(io.BytesIO(path.read_bytes()), columns=["done_s"]) for path in sorted(out.glob("*.parquet"))
    ]
    done = sorted(moment for table in tables for moment in table["done_s"].to_pylist())
    if len(done) != len(paths):
        raise ValueError(f"Ray Data wrote {len(done)} rows of {len(paths)}")
    # The batches of the first moments, one an actor; there are fewer only in a test.
    moments = sorted(set(done))
    first = moments[min(WORKERS, len(moments)) - 1]
    rows = sum(moment > first for moment in done)
    return {"wall_s": ended - first, "rows": rows, "start_s": first - called}
