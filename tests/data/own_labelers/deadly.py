"""A labeler of one's own, as a user would bring it, that does to its process what a file of orders says."""

import ctypes
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modmill import LabelerSpec


class Deadly:
    """Palettes. `orders` is a JSON file: for the names of photographs, or `all`, "exit", "segv", "hang", "raise" or
    "wait" until it is told otherwise. The processes that labeled are told in `pids` beside it."""

    spec = LabelerSpec(
        name="deadly:Deadly", version=1, scope="image", outputs=("palette",), inputs=("image", "source"), batch=4
    )

    def __init__(self, orders: str) -> None:
        self.orders = Path(orders)

    def label(self, batch: Mapping[str, Any]) -> Mapping[str, list[Any]]:
        with open(self.orders.with_name("pids"), "a") as file:
            file.write(f"{os.getpid()}\n")
        for source in batch["source"]:
            name = source.rpartition("/")[2]
            while (order := self._order(name)) == "wait":
                time.sleep(0.05)
            if order == "exit":
                os._exit(1)
            if order == "segv":
                ctypes.string_at(0)
            if order == "hang":
                time.sleep(600)
            if order == "raise":
                raise ValueError("this one cannot be labeled")
        return {"palette": [[_mean_color(image)] for image in batch["image"]]}

    def _order(self, name: str) -> str | None:
        told = json.loads(self.orders.read_text())
        return told.get(name, told.get("all"))


class DeadlyDepth(Deadly):
    """The same with depth, which has a tokenizer to be fitted: a photograph's gray values, metres."""

    spec = LabelerSpec(
        name="deadly:DeadlyDepth", version=1, scope="image", outputs=("depth",), inputs=("image", "source"), batch=4
    )

    def label(self, batch: Mapping[str, Any]) -> Mapping[str, list[Any]]:
        super().label(batch)
        return {"depth": [image.mean(axis=2, dtype=np.float32) for image in batch["image"]]}


def _mean_color(image: np.ndarray) -> dict[str, Any]:
    r, g, b = np.rint(image.mean(axis=(0, 1))).astype(int).tolist()
    return {"k": 1, "rank": 0, "r": r, "g": g, "b": b, "share": 1.0}
