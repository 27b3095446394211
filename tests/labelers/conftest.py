"""Checkpoints of the labelers that have weights: true architectures, cut to size, with random weights."""

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.engine import weights


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a labeler's checkpoint, by the labeler's name; `metric` is a `dpt` that gives meters."""
    makers: dict[str, Callable[[Path], Path]] = {
        # As wide as its modalities.
        "dinov2": lambda folder: weights.dinov2(
            folder, image_size=224, num_hidden_layers=1, num_attention_heads=12, mlp_ratio=1
        ),
        "registers": lambda folder: weights.dinov2(
            folder, registers=4, image_size=224, num_hidden_layers=1, num_attention_heads=12, mlp_ratio=1
        ),
        "dpt": weights.depth_tiny,
        "metric": lambda folder: weights.depth_tiny(folder, metric=True),
    }
    made: dict[str, str] = {}

    def make(name: str) -> str:
        if name not in made:
            made[name] = str(makers[name](tmp_path_factory.mktemp(name)))
        return made[name]

    return make
