"""Defines what `benchmarks.engine` compares the engine with: the plain loop, and the bare model.

The loop is what one writes in an afternoon: read, decode, crop, label, encode, one file a modality; no checks, no
retries, no record. It calls the very functions that the engine calls.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

LIGHT = ("rgb", "edges", "metadata", "palette")
SIDE = 224


def pin(core: int) -> None:
    """Keeps this process and what it starts on one core from here on; arithmetic has one thread."""
    import cv2

    os.environ["OMP_NUM_THREADS"] = "1"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    cv2.setNumThreads(1)


def light_labelers() -> dict[str, Any]:
    """Loads the four labelers of the light group."""
    from labelers import protocol

    return {name: protocol.build(protocol.find(name), {}) for name in LIGHT}


def label_image(loaded: Mapping[str, Any], image: np.ndarray, key: str) -> dict[str, Any]:
    """Returns the four labels of one decoded photograph: its centre crop's pixels and edges, its metadata and palettes."""
    from manifests.pixels import crops

    height, width = image.shape[:2]
    crop = crops.crop_pixels(image, crops.plan_crop(crops.CropRule(), key, 0, width, height), SIDE)[None]
    return {
        "rgb": loaded["rgb"].label({"image": crop})["rgb"][0],
        "edges": loaded["edges"].label({"image": crop})["edges"][0],
        "metadata": loaded["metadata"].label({"image": [image], "caption": [None]})["metadata"][0],
        "palette": loaded["palette"].label({"image": [image]})["palette"][0],
    }


def light_loop(paths: Sequence[Path], out: Path) -> dict[str, float]:
    """Reads, decodes, crops, labels and encodes every photograph, and writes four files; wall and CPU seconds."""
    from manifests import modality
    from manifests.formats import shards
    from manifests.pixels import images

    loaded = light_labelers()
    label_image(loaded, images.decode(paths[0].read_bytes()), "warm-up")
    out.mkdir(parents=True, exist_ok=True)
    started, cpu = time.perf_counter(), time.process_time()
    tars = {name: shards.TarWriter("png") for name in ("rgb", "edges")}
    records: dict[str, list[Any]] = {"metadata": [], "palette": []}
    keys = []
    for path in paths:
        labels = label_image(loaded, images.decode(path.read_bytes()), path.stem)
        for name, tar in tars.items():
            tar.add(path.stem, 0, images.encode_png(labels[name]))
        for name, values in records.items():
            values.append(labels[name])
        keys.append(path.stem)
    for name, tar in tars.items():
        with tar.finish() as file:
            (out / f"{name}.tar").write_bytes(file.read())
    for name, values in records.items():
        data = shards.write_labels(keys, [0] * len(keys), values, modality.get(name), {})
        (out / f"{name}.parquet").write_bytes(data)
    return {"wall_s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu, "rows": len(paths)}


def light_functions_ms(paths: Sequence[Path], repeats: int = 3) -> dict[str, float]:
    """Milliseconds an image of each labeler on decoded photographs: the least of some repeats, the mean over images."""
    from manifests.pixels import crops, images

    loaded = light_labelers()
    total: dict[str, float] = dict.fromkeys((*LIGHT, "decode", "crop"), 0.0)
    for path in paths:
        data = path.read_bytes()
        image = images.decode(data)
        rule = crops.CropRule()
        crop = crops.crop_pixels(image, crops.plan_crop(rule, path.stem, 0, image.shape[1], image.shape[0]), SIDE)[None]
        whole = {"image": [image], "caption": [None]}
        calls: dict[str, Callable[[], Any]] = {
            "rgb": lambda crop=crop: loaded["rgb"].label({"image": crop}),
            "edges": lambda crop=crop: loaded["edges"].label({"image": crop}),
            "metadata": lambda whole=whole: loaded["metadata"].label(whole),
            "palette": lambda whole=whole: loaded["palette"].label(whole),
            "decode": lambda data=data: images.decode(data),
            "crop": lambda image=image, path=path, rule=rule: crops.crop_pixels(
                image, crops.plan_crop(rule, path.stem, 0, image.shape[1], image.shape[0]), SIDE
            ),
        }
        for name, call in calls.items():
            total[name] += min(_seconds(call) for _ in range(repeats))
    return {name: 1000 * seconds / len(paths) for name, seconds in total.items()}


def bare_model(
    labeler: str, checkpoint: str, paths: Sequence[Path], *, batch: int, threads: int, batches: int
) -> dict[str, float]:
    """Runs a model on float32 tensors in memory and nothing else: wall seconds of some batches, after one to warm up.

    The tensors are the centre crops of the photographs, normalized; the model is the one that the labeler loads.
    """
    import torch

    from labelers import protocol
    from manifests.pixels import crops, images

    torch.set_num_threads(threads)
    loaded: Any = protocol.build(protocol.find(labeler), {"checkpoint": checkpoint})
    cut = np.zeros((batch, SIDE, SIDE, 3), np.uint8)
    for place, path in enumerate(paths[:batch]):
        image = images.decode(path.read_bytes())
        crop = crops.plan_crop(crops.CropRule(), path.stem, 0, image.shape[1], image.shape[0])
        cut[place] = crops.crop_pixels(image, crop, SIDE)
    with torch.inference_mode():
        pixels = loaded.preprocessing.normalize(torch.from_numpy(cut))
        loaded.model(pixel_values=pixels)
        started, cpu = time.perf_counter(), time.process_time()
        for _ in range(batches):
            loaded.model(pixel_values=pixels)
    return {"wall_s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu, "rows": batches * batch}


def _seconds(call: Any) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
