"""Saves and restores the states of the process's random generators, as plain JSON values.

Training draws from keyed hashes alone; these are kept for whatever a library draws from them.
"""

import base64
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def states() -> dict[str, Any]:
    """Returns the states of Python, numpy (the legacy generator) and torch, including each GPU's."""
    version, words, gauss = random.getstate()
    kind, array, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, _text(np.asarray(array).tobytes()), position, has_gauss, cached],
        "torch": _text(torch.get_rng_state().numpy().tobytes()),
        "cuda": [_text(state.numpy().tobytes()) for state in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_available()
        else [],
    }


def restore(document: Mapping[str, Any]) -> None:
    """Sets the generators to what `states` returned; GPUs that this machine does not have are skipped."""
    version, words, gauss = document["python"]
    random.setstate((version, tuple(words), gauss))
    kind, array, position, has_gauss, cached = document["numpy"]
    np.random.set_state((kind, np.frombuffer(base64.b64decode(array), np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_tensor(document["torch"]))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for number, state in enumerate(document["cuda"][:gpus]):
        torch.cuda.set_rng_state(_tensor(state), number)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
