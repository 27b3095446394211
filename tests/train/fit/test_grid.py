"""Fitting grid tokenizers: quality on simple pictures, the same bytes after an interruption and in another process."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from manifests.errors import ConfigError
from manifests.modality import MODALITIES, Modality
from tokenize_jobs import protocol
from tokenize_jobs.grid import GridTokenizer
from train.fit.grid import GridOptions, fit_grid

TINY = GridOptions(
    patch=8,
    codebook=32,
    latent=8,
    width=16,
    depth=1,
    steps=12,
    batch=4,
    window=24,
    start_patches=256,
    start_rounds=3,
    checkpoint_every=5,
)
DISKS = ("rgb", "edges", "depth", "normals", "segmentation")


def disks(name: str, rows: int = 12, seed: int = 0, size: int = 32) -> tuple[np.ndarray, Modality]:
    """One disk before a ramp, as labels of a modality of 32 px; some rows have pixels without a value."""
    rng = np.random.default_rng(seed)
    modality = replace(MODALITIES[name], size=size)
    labels = np.zeros((rows, *modality.shape()), dtype=modality.dtype)
    y, x = np.mgrid[:size, :size]
    for row in labels:
        disk = np.hypot(y - rng.integers(8, 24), x - rng.integers(8, 24)) < rng.integers(5, 10)
        if name == "rgb":
            row[:] = (x * 4)[..., None] + rng.integers(100, size=3)
            row[disk] = rng.integers(256, size=3)
        elif name == "edges":
            row[disk & ~(np.roll(disk, 1, 0) & np.roll(disk, 1, 1))] = 255
        elif name == "depth":
            row[:] = np.where(disk, 2.0, 5.0 + y / 8)
            row[0, :8] = np.nan
        elif name == "normals":
            row[:] = np.where(disk[..., None], (0.6, 0.0, -0.8), (0.0, 0.0, -1.0))
            row[0, :8] = 0
        else:
            row[:] = np.where(disk, rng.integers(1, 4), 0)
            row[0, :8] = 255
    return labels, modality


def fit(out: Path, name: str = "rgb", options: GridOptions = TINY, **arguments: object) -> dict[str, float]:
    labels, modality = disks(name)
    judged, _ = disks(name, rows=4, seed=1)
    return fit_grid(labels, modality, options, out, judged=judged, threads=1, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "figure", "sign"),
    [
        ("rgb", "psnr_db", 1),
        ("edges", "psnr_db", 1),
        ("depth", "abs_error_std", -1),
        ("normals", "angle_deg", -1),
        ("segmentation", "pixel_accuracy", 1),
    ],
)
def test_beats_the_best_flat_picture_on_rows_it_was_not_fitted_on(
    tmp_path: Path, name: str, figure: str, sign: int
) -> None:
    figures = fit(tmp_path, name, replace(TINY, steps=60))
    assert sign * figures[figure] > sign * figures[f"flat_{figure}"]
    assert 0 < figures["codebook_use"] <= 1
    tokenizer = protocol.load(tmp_path, name)
    labels, _ = disks(name, rows=4, seed=1)
    tokens = tokenizer.encode(labels)
    assert len(np.unique(np.stack(tokens))) > 1
    assert np.shape(tokenizer.decode(tokens)) == labels.shape


def test_steps_improve_on_the_start(tmp_path: Path) -> None:
    modality = replace(MODALITIES["edges"], size=48)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:48, :48]
    waves = [
        np.sin(x * across + y * down + at)
        for across, down, at in rng.uniform((-0.15, -0.15, 0), (0.15, 0.15, 6), (48, 3))
    ]
    labels = (127 + 120 * np.stack(waves)).astype(np.uint8)

    def psnr_db(steps: int) -> float:
        options = replace(TINY, width=32, start_patches=512, window=40, steps=steps)
        return fit_grid(labels[:40], modality, options, tmp_path, judged=labels[40:], threads=1)["psnr_db"]

    # What the neighbors of a patch say of it is known to the trunks alone, which start at zero.
    assert psnr_db(100) > psnr_db(1) + 1


@pytest.mark.parametrize("name", ["rgb", "segmentation"])
def test_a_resumed_fit_ends_in_the_same_bytes(tmp_path: Path, name: str) -> None:
    checkpoints: list[tuple[int, bytes]] = []
    whole = fit(tmp_path / "whole", name, save=lambda step, data: checkpoints.append((step, data)))
    assert [step for step, _ in checkpoints] == [5, 10]
    steps: list[int] = []
    resumed = fit(tmp_path / "resumed", name, resume=checkpoints[0], on_step=lambda step, _: steps.append(step))
    assert steps == list(range(6, 13))
    assert resumed == whole
    assert protocol.digest(tmp_path / "whole") == protocol.digest(tmp_path / "resumed")
    # A checkpoint of a resumed fit is as good as one of the first.
    again: list[tuple[int, bytes]] = []
    fit(tmp_path / "again", name, resume=checkpoints[0], save=lambda step, data: again.append((step, data)))
    assert again == checkpoints[1:]


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    script = (
        "import importlib.util, pathlib, sys\n"
        "spec = importlib.util.spec_from_file_location('there', sys.argv[1])\n"
        "there = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(there)\n"
        "there.fit(pathlib.Path(sys.argv[2]), 'normals')\n"
    )
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", script, __file__, str(tmp_path / "there")], check=True, cwd=root)
    fit(tmp_path / "here", "normals")
    assert protocol.digest(tmp_path / "here") == protocol.digest(tmp_path / "there")


def test_the_seed_and_nothing_outside_decides(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(1)
    fit(tmp_path / "first")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    fit(tmp_path / "second", options=replace(TINY, checkpoint_every=3))
    assert torch.equal(torch.get_rng_state(), state)
    fit(tmp_path / "other", options=replace(TINY, seed=1))
    first, second, other = (protocol.digest(tmp_path / name) for name in ("first", "second", "other"))
    assert first == second
    assert first != other


def test_labels_may_be_a_memory_map(tmp_path: Path) -> None:
    labels, modality = disks("depth")
    np.save(tmp_path / "labels.npy", labels)
    mapped = np.load(tmp_path / "labels.npy", mmap_mode="r")
    options = replace(TINY, steps=3)
    fit_grid(mapped, modality, options, tmp_path / "mapped", judged=labels[:2], threads=1)
    fit_grid(labels, modality, options, tmp_path / "whole", judged=labels[:2], threads=1)
    assert protocol.digest(tmp_path / "mapped") == protocol.digest(tmp_path / "whole")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    labels, modality = disks("rgb")
    rest = {"out": tmp_path, "judged": labels, "threads": 1}
    with pytest.raises(ConfigError, match=r"uint8 \(12, 32, 32, 3\), expected uint8 \(rows, 224, 224, 3\)"):
        fit_grid(labels, MODALITIES["rgb"], TINY, **rest)
    with pytest.raises(ConfigError, match="no multiple of the patch, 12 px"):
        fit_grid(labels, modality, replace(TINY, patch=12), **rest)
    with pytest.raises(ConfigError, match="not one of this fit"):
        fit_grid(labels, modality, TINY, resume=(5, b"nothing of the kind"), **rest)
    void, classes = np.full((2, 32, 32), 255, dtype=np.uint8), replace(MODALITIES["segmentation"], size=32)
    with pytest.raises(ConfigError, match="no class to fit"):
        fit_grid(void, classes, TINY, **rest)


def test_feature_maps_are_fitted_cell_by_cell(tmp_path: Path) -> None:
    """Maps of two kinds of cells come back as they are, and a map of another size is more of the same cells."""
    modality = replace(MODALITIES["dinov2"], channels=12, size=8 * 14)
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(2, 12)).astype(np.float32) * 4
    labels = kinds[rng.integers(2, size=(24, 8, 8))]
    options = replace(TINY, patch=1, codebook=4, window=8, mirror=False)
    figures = fit_grid(labels, modality, options, tmp_path, judged=labels[:4], threads=1)
    assert figures["cosine"] > 0.95
    assert figures["cosine"] > figures["flat_cosine"]
    fitted = GridTokenizer.load(tmp_path, "dinov2")
    assert fitted.spec.tokens == 64
    assert fitted.decode(fitted.encode(labels[:2])).shape == (2, 8, 8, 12)
    # The same tokens of a tensor, as a labeler may give it.
    assert np.array_equal(fitted.encode(labels[:2]), fitted.encode(torch.from_numpy(labels[:2])))


def test_a_latent_of_more_values_than_a_patch_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a patch of 2 px has 4 values, fewer than the latent, 8"):
        fit(tmp_path, "edges", replace(TINY, patch=2))
