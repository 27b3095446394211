"""Golden samples: a labeler's outputs may only change together with its version.

Where a digest differs, either the change was not meant, or `version` in the labeler's spec is to be raised; then write
the new version and the digest that the failure shows.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import skimage.data

from labelers import protocol
from manifests.pixels import images
from manifests.pixels.crops import CropRule, crop_pixels, plan_crop

# Labeler: version, digest.
GOLDEN: dict[str, tuple[int, str]] = {
    "caption": (1, "72fe500ba1214dc5"),
    "edges": (1, "a51f267adb3781a1"),
    "files": (1, "51dcfbb488ba7826"),
    "metadata": (1, "1d4f875afeae8913"),
    "palette": (1, "d6fc0c2167f3df41"),
    "rgb": (1, "471dfa1c612b0a4b"),
    "segments": (1, "986ecfee2580513f"),
    "text": (1, "7c59c97e9cb1f688"),
}
# Of those with weights, which compute in floats whose last bits differ between processors: version, and for each output the
# mean, the deviation and three values of the labels, with the tests' random weights.
GOLDEN_FLOATS: dict[str, tuple[int, dict[str, list[float]]]] = {
    "dinov2": (
        1,
        {
            "dinov2": [0.0, 1.0, -0.6166, 0.0915, -0.8603],
            "dinov2_global": [0.0, 1.0, -0.4915, 0.7437, -1.0677],
        },
    ),
    "dpt": (1, {"depth": [54.5181, 6.1585, 52.3845, 56.9472, 56.9472]}),
}
# DECODER_VERSION, digest.
GOLDEN_CROPS = (1, "cf18e423eaad4c60")
OPTIONS: dict[str, dict[str, Any]] = {"files": {"modality": "normals", "column": "normals"}}


def photos() -> list[np.ndarray]:
    """PNGs of scikit-image's wheel: a JPEG's pixels would depend on the decoder's release."""
    return [
        skimage.data.astronaut(),
        skimage.data.coffee(),
        skimage.data.chelsea(),
        skimage.data.immunohistochemistry(),
    ]


def crops() -> np.ndarray:
    return np.stack(
        [
            crop_pixels(photo, plan_crop(CropRule(), "golden", number, photo.shape[1], photo.shape[0]), 224)
            for number, photo in enumerate(photos())
        ]
    )


def inputs(labeler: protocol.Labeler) -> dict[str, Any]:
    texts = [" An astronaut. Smiling! ", "coffee", "", "A rocket, at 5.30 a.m."]
    rng = np.random.default_rng(0)
    available = {
        "image": crops() if labeler.spec.scope == "crop" else photos(),
        "caption": [*texts[:2], None, texts[3]],
        "source": [f"photos/{name}.png" for name in "abcd"],
        "columns": [
            {"caption": text, "text": text, "normals": rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)}
            for text in texts
        ],
    }
    return {name: available[name] for name in labeler.spec.inputs}


def canonical(value: Any) -> Any:
    """Plain JSON: arrays as dtype, shape and sha256, floats as what float32 holds of them."""
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), hashlib.sha256(np.ascontiguousarray(value)).hexdigest()]
    if isinstance(value, dict):
        return {name: canonical(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(entry) for entry in value]
    return float(f"{np.float32(value):.6g}") if isinstance(value, float) else value


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(canonical(value), sort_keys=True).encode()).hexdigest()[:16]


WEIGHTLESS = [name for name in protocol.names() if protocol.find(name).spec.checkpoint is None]


@pytest.mark.parametrize("name", WEIGHTLESS)
def test_outputs_change_only_with_the_version(name):
    labeler = protocol.build(protocol.find(name), OPTIONS.get(name, {}))
    found = (labeler.spec.version, digest(dict(labeler.label(inputs(labeler)))))
    assert found == GOLDEN.get(name)


@pytest.mark.parametrize("name", [name for name in protocol.names() if name not in WEIGHTLESS])
def test_outputs_of_weights_change_only_with_the_version(name: str, checkpoint: Callable[[str], str]) -> None:
    labeler = protocol.build(protocol.find(name), {"checkpoint": checkpoint(name)})
    version, expected = GOLDEN_FLOATS.get(name, (0, {}))
    found = {output: figures(labels[0]) for output, labels in labeler.label(inputs(labeler)).items()}
    assert labeler.spec.version == version, found
    assert found == {output: pytest.approx(values, rel=1e-3, abs=1e-3) for output, values in expected.items()}


def figures(label: np.ndarray) -> list[float]:
    flat = label.astype(np.float64).ravel()
    values = [flat.mean(), flat.std(), flat[0], flat[len(flat) // 3], flat[-1]]
    return [round(float(value), 4) for value in values]


def test_crops_change_only_with_the_decoders_version():
    assert (images.DECODER_VERSION, digest(crops())) == GOLDEN_CROPS
