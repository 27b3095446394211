"""DINOv2's features: the true architecture with random weights, through the same loading path as published ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.engine import weights
from labelers import pretrained
from labelers.dinov2 import Dinov2
from manifests.errors import ConfigError

Checkpoint = Callable[[str], str]


def crops(rows: int = 3, side: int = 224) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["dinov2", "registers"])
def test_features_are_the_librarys_own(checkpoint: Checkpoint, name: str) -> None:
    from transformers import AutoModel

    images = crops()
    found = Dinov2(checkpoint=checkpoint(name)).label({"image": images})
    assert found["dinov2"].shape == (3, 16, 16, 768)
    assert found["dinov2_global"].shape == (3, 768)
    assert {labels.dtype.name for labels in found.values()} == {"float32"}

    scaled = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    pixels = torch.from_numpy(scaled).float().permute(0, 3, 1, 2)
    with torch.inference_mode():
        model = AutoModel.from_pretrained(checkpoint(name)).eval()
        tokens = model(pixel_values=pixels).last_hidden_state.numpy()
    np.testing.assert_allclose(found["dinov2_global"], tokens[:, 0], rtol=0, atol=2e-5)
    # The map's rows are the picture's rows; registers are left out.
    np.testing.assert_allclose(found["dinov2"][:, 1, 2], tokens[:, -256 + 18], rtol=0, atol=2e-5)


def test_larger_crops_have_larger_maps(checkpoint: Checkpoint) -> None:
    found = Dinov2(checkpoint=checkpoint("dinov2")).label({"image": crops(1, 280)})
    assert found["dinov2"].shape == (1, 20, 20, 768)


def test_mean_and_deviation_are_the_checkpoints_own(checkpoint: Checkpoint, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint("dinov2"), tmp_path / "copy"))
    (copy / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    facts = pretrained.preprocessing(copy)
    assert facts.normalize(torch.full((1, 1, 1, 3), 255, dtype=torch.uint8)).flatten().tolist() == [1.0] * 3
    (copy / "preprocessor_config.json").unlink()
    assert pretrained.preprocessing(copy).mean == (0.485, 0.456, 0.406)


def test_another_width_is_a_subclass_and_modalities_of_its_own(tmp_path: Path) -> None:
    folder = str(weights.dinov2_tiny(tmp_path / "tiny"))
    with pytest.raises(ConfigError, match="192 channels, dinov2 has 768; declare a modality"):
        Dinov2(checkpoint=folder)
    found = weights.TinyDinov2(checkpoint=folder).label({"image": crops(2)})
    assert {name: labels.shape[1:] for name, labels in found.items()} == {
        "tiny_map": weights.TINY_MAP.shape(),
        "tiny_global": weights.TINY_GLOBAL.shape(),
    }


def test_compute_in_bfloat16_is_near_and_gives_float32(checkpoint: Checkpoint) -> None:
    labeler, batch = Dinov2(checkpoint=checkpoint("dinov2")), {"image": crops(1)}
    exact = labeler.label(batch)["dinov2_global"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = labeler.label(batch)["dinov2_global"]
    assert near.dtype == np.float32
    assert not np.array_equal(near, exact)
    assert np.linalg.norm(near - exact) < 0.02 * np.linalg.norm(exact)


def test_a_checkpoint_that_lacks_tensors_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The library would fill them with random numbers and go on."""
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(checkpoint("dinov2"), tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"is missing 1 of the model's tensors, such as layernorm\.weight"):
        Dinov2(checkpoint=str(copy))


@pytest.mark.parametrize(
    ("config", "words"), [('{"model_type": "bert"}', "of type 'bert'; expected dinov2"), (None, "config.json")]
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, config: str | None, words: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=words):
        Dinov2(checkpoint=str(tmp_path))
