"""Fits a grid tokenizer to the labels of one modality.

It begins at vector quantization of principal components (`networks.start_from`, `vq.start_codebook`) and improves encoder,
decoder and codebook together by stochastic gradients on windows of the crops. Every random choice is a function of
(seed, step), so that a fit that was killed and resumed ends in the same bytes as one that was not.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import ceil, cos, pi
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from manifests.errors import ConfigError
from manifests.modality import Modality
from tokenize_jobs.grid import GridTokenizer, chunks, write
from tokenize_jobs.grids.coding import Coding, Rule, coding_of
from tokenize_jobs.grids.networks import GridNetwork, empty, initialize, patchify, start_from
from tokenize_jobs.quantizers.vq import MovingAverages, start_codebook
from tokenize_jobs.reconstruction import measure
from train.optim.muon import MuonAdam

# Patches that the principal components are computed from.
_COMPONENT_PATCHES = 8192
_WARMUP_STEPS = 20
# What a null pixel counts beside a valid one. A little, or what is decoded there is noise; nothing of classes, which have
# no null output; as much as any of directions, whose zero vector says that nothing is there.
_NULL_WEIGHTS: dict[Rule, float] = {"range": 0.1, "standardize": 0.1, "direction": 1.0, "classes": 0.0, "plain": 0.0}


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """Holds everything that decides a fit besides its labels, as plain JSON values.

    The defaults fit 224 px crops on one CPU core in about a minute. On a GPU raise `codebook` to 8192 or 16384, `width` to
    512, `depth` to 8, `batch` to 256, `window` to 224 and `steps` to 50,000 or more, and lower both rates to a quarter.

    patch           side of a token's square, px; of a feature map, cells
    codebook        codes
    latent          values per code
    width, depth    channels, and ConvNeXt blocks on either side
    class_channels  channels that classes are embedded in at most
    steps, batch    updates, and windows per update
    window          side of the window that is cut from a crop, px; rounded down to whole patches
    mirror          mirror half of the windows
    rate            Adam's highest learning rate, for vectors, kernels and the linear maps
    matrix_rate     Muon's, for the matrices of the residual trunks
    commitment      weight of the latents' distance from their codes beside the reconstruction's error, which is 1 for the best
                    constant picture
    decay           of the codebook's moving averages
    start_patches, start_rounds   of the k-means that the codebook starts from
    """

    patch: int = 16
    codebook: int = 1024
    latent: int = 32
    width: int = 128
    depth: int = 2
    class_channels: int = 16
    steps: int = 400
    batch: int = 24
    window: int = 128
    mirror: bool = True
    rate: float = 4e-3
    matrix_rate: float = 0.03
    commitment: float = 0.6
    decay: float = 0.98
    start_patches: int = 65536
    start_rounds: int = 10
    seed: int = 0
    checkpoint_every: int = 50


@dataclass(kw_only=True)
class _State:
    """Holds all that a step changes and a checkpoint saves. `reference` is the error of the best constant picture."""

    network: GridNetwork
    averages: MovingAverages
    optimizer: MuonAdam
    reference: Tensor


@dataclass(frozen=True, kw_only=True)
class _Windows:
    """Cuts windows out of the labels, at random."""

    labels: np.ndarray
    coding: Coding
    scaling: np.ndarray
    side: int
    mirror: bool
    device: str

    def draw(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Returns prepared windows of `count` crops, and which of their pixels have a value, (count, side, side)."""
        total, size = len(self.labels), self.labels.shape[1]
        rows = rng.choice(total, size=count, replace=total < count)
        corners = rng.integers(size - self.side + 1, size=(2, count))
        mirrored = rng.random(count) < (0.5 if self.mirror else 0.0)
        cut = np.stack(
            [self.labels[i, y : y + self.side, x : x + self.side] for i, y, x in zip(rows, *corners, strict=True)]
        )
        cut[mirrored] = cut[mirrored][:, :, ::-1]
        inputs, valid = self.coding.prepare(cut, self.scaling[rows])
        if self.coding.mirror_x:
            inputs[mirrored, ..., 0] *= -1
        return torch.from_numpy(inputs).to(self.device), torch.from_numpy(valid).to(self.device)


def fit_grid(
    labels: np.ndarray,
    modality: Modality,
    options: GridOptions,
    out: Path,
    *,
    judged: np.ndarray,
    threads: int,
    resume: tuple[int, bytes] | None = None,
    save: Callable[[int, bytes], None] | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    device: str = "cpu",
) -> dict[str, float]:
    """Fits a tokenizer on labels (N, *modality.shape()), writes it into `out` and measures it on `judged`.

    The files are config.json and model.safetensors. `labels` may be a memory map: only windows of it are read at a time.
    `save` is given the steps done and a checkpoint (safetensors) every `checkpoint_every` steps; `resume` takes such a
    pair, made with equal labels, options and threads, and the files are then the same to the bit as without the
    interruption. `on_step` is given the steps done and the losses. Returns the figures of
    `tokenize_jobs.reconstruction.measure`. On a CPU equal arguments give equal files; `threads` is set for the whole
    process. Raises ConfigError on labels or options that do not fit the modality.
    """
    torch.set_num_threads(threads)
    _check(labels, modality, options)
    coding = _known_classes(coding_of(modality), labels)
    windows = _Windows(
        labels=labels,
        coding=coding,
        scaling=np.concatenate([coding.scaling(part) for part in chunks(labels)]),
        side=max(1, min(options.window, labels.shape[1]) // options.patch) * options.patch,
        mirror=options.mirror,
        device=device,
    )
    shape = _network_shape(coding, options)
    state = _start(windows, shape, options) if resume is None else _restored(resume[1], shape, device)
    for step in range(0 if resume is None else resume[0], options.steps):
        losses = _step(state, windows, options, step)
        if on_step is not None:
            on_step(step + 1, losses)
        if save is not None and (step + 1) % options.checkpoint_every == 0:
            save(step + 1, _checkpoint(state))
    # How often checkpoints were written decides nothing, and must not change the name of the tokenizer.
    fit = {name: value for name, value in asdict(options).items() if name != "checkpoint_every"} | {"rows": len(labels)}
    write(out, state.network, coding, modality=modality, shape=shape, fit=fit)
    tokenizer = GridTokenizer(state.network, coding, modality=modality.name, size=labels.shape[1], device=device)
    return measure(tokenizer, judged)


def _check(labels: np.ndarray, modality: Modality, options: GridOptions) -> None:
    if len(labels) == 0 or labels.shape[1:] != modality.shape() or labels.dtype != modality.dtype:
        raise ConfigError(
            f"labels of {modality.name!r} are {labels.dtype} {labels.shape}, expected {modality.dtype} "
            f"(rows, {', '.join(map(str, modality.shape()))}) with at least one row"
        )
    unit = "cells" if modality.kind == "feature_map" else "px"
    if labels.shape[1] % options.patch:
        raise ConfigError(
            f"{modality.name!r} has a size of {labels.shape[1]} {unit}, which is no multiple of the patch, "
            f"{options.patch} {unit}"
        )
    values = options.patch**2 * modality.channels
    if coding_of(modality).rule != "classes" and values < options.latent:
        raise ConfigError(
            f"{modality.name!r}: a patch of {options.patch} {unit} has {values} values, fewer than the latent, "
            f"{options.latent}; fit with a larger patch or `latent: {values}`"
        )


def _known_classes(coding: Coding, labels: np.ndarray) -> Coding:
    """Returns the coding with the number of classes that occur, if its rule is `classes`."""
    if coding.rule != "classes":
        return coding
    largest = -1
    for part in chunks(labels):
        kept = part if coding.null is None else part[part != coding.null]
        largest = max(largest, int(kept.max()) if kept.size else -1)
    if largest < 0:
        raise ConfigError("every pixel of the labels is null: there is no class to fit a tokenizer on")
    return replace(coding, classes=largest + 1)


def _network_shape(coding: Coding, options: GridOptions) -> dict[str, int]:
    return {
        "channels": min(coding.classes + 1, options.class_channels) if coding.classes else coding.channels,
        "classes": coding.classes,
        "patch": options.patch,
        "codebook": options.codebook,
        "latent": options.latent,
        "width": options.width,
        "encoder_blocks": options.depth,
        "decoder_blocks": options.depth,
    }


@torch.no_grad()
def _start(windows: _Windows, shape: dict[str, int], options: GridOptions) -> _State:
    """Returns the state before the first step: principal components and k-means."""
    generator = torch.Generator().manual_seed(options.seed)
    network = empty(**shape)
    initialize(network, generator)
    network.to(windows.device)
    # Steps draw from (seed, 1, step), this from (seed, 0).
    rng = np.random.default_rng((options.seed, 0))
    cells = (windows.side // options.patch) ** 2
    inputs, valid = windows.draw(rng, ceil(_COMPONENT_PATCHES / cells))
    reference = _constant_error(windows.coding, inputs, valid)
    start_from(network, patchify(network.pixels(inputs), options.patch).flatten(0, 2), generator)
    draws = ceil(options.start_patches / cells / options.batch)
    latents = [network.latents(windows.draw(rng, options.batch)[0]).flatten(0, 2) for _ in range(draws)]
    averages = start_codebook(
        network.codebook, torch.cat(latents), rounds=options.start_rounds, batch=options.batch * cells, rng=rng
    )
    return _State(network=network, averages=averages, optimizer=_optimizer(network), reference=reference)


def _optimizer(network: GridNetwork) -> MuonAdam:
    """Returns Muon for the matrices of the residual trunks and Adam for the rest.

    Muon reached in 300 steps what Adam alone reached in about 700, at a sixth more time per step. The linear maps are
    left to Adam: they start at a good place, and a Muon step moves every direction of a matrix alike.
    """
    matrices, others = {}, {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            inner = parameter.ndim == 2 and ".trunk." in name and ".trunk.linear." not in name
            (matrices if inner else others)[name] = parameter
    return MuonAdam(matrices, others)


def _step(state: _State, windows: _Windows, options: GridOptions, step: int) -> dict[str, float]:
    """Makes one update; `step` counts from 0."""
    rng = np.random.default_rng((options.seed, 1, step))
    inputs, valid = windows.draw(rng, options.batch)
    network = state.network
    latents = network.latents(inputs)
    indices = network.codebook.nearest(latents)
    codes = network.codebook(indices)
    # Straight through: the decoder sees codes, the encoder gets the decoder's gradient as if it saw latents.
    outputs = network.outputs(latents + (codes - latents).detach())
    reconstruction = _error(windows.coding, outputs, inputs, valid) / state.reference
    commitment = nn.functional.mse_loss(latents, codes)
    (reconstruction + options.commitment * commitment).backward()
    nn.utils.clip_grad_norm_(state.optimizer.others.values(), 1.0)
    pace = min(1.0, (step + 1) / _WARMUP_STEPS) * (1 + cos(pi * step / options.steps)) / 2
    state.optimizer.step(step + 1, matrix_rate=options.matrix_rate * pace, rate=options.rate * pace)
    flat = latents.detach().flatten(0, 2)
    replaced = state.averages.update(network.codebook, flat, indices.flatten(), decay=options.decay, rng=rng)
    return {"reconstruction": reconstruction.item(), "commitment": commitment.item(), "codes_replaced": float(replaced)}


def _error(coding: Coding, outputs: Tensor, inputs: Tensor, valid: Tensor) -> Tensor:
    """Returns the mean error of a pixel: cross-entropy in nats, or else squared (absolute from 1 on if unbounded)."""
    weights = torch.where(valid, 1.0, _NULL_WEIGHTS[coding.rule])
    if coding.rule == "classes":
        flat = outputs.flatten(0, 2), inputs.flatten()
        error = nn.functional.cross_entropy(*flat, ignore_index=coding.classes, reduction="sum")
        return error / weights.sum().clamp(min=1)
    if coding.rule in ("standardize", "plain"):
        # Far things have standardized depths of 10 and more, which squares would let rule the fit; some features too.
        error = nn.functional.smooth_l1_loss(outputs, inputs, reduction="none")
    else:
        error = (outputs - inputs).square()
    return (error.mean(dim=-1) * weights).sum() / weights.sum().clamp(min=1)


def _constant_error(coding: Coding, inputs: Tensor, valid: Tensor) -> Tensor:
    """Returns the error of the best constant picture: the unit that makes reconstruction errors of modalities comparable."""
    if coding.rule == "classes":
        share = torch.bincount(inputs[valid], minlength=coding.classes) / valid.sum().clamp(min=1)
        outputs = share.clamp(min=1e-6).log().expand(*inputs.shape, coding.classes)
    else:
        outputs = inputs[valid].mean(dim=0).nan_to_num().expand_as(inputs)
    return _error(coding, outputs, inputs, valid).clamp(min=1e-6)


def _checkpoint(state: _State) -> bytes:
    """Packs the state as safetensors."""
    tensors = {f"network.{name}": tensor for name, tensor in state.network.state_dict().items()}
    tensors |= {"count": state.averages.count, "total": state.averages.total, "reference": state.reference}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in state.optimizer.state.items()}
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _restored(checkpoint: bytes, shape: dict[str, int], device: str) -> _State:
    """Returns the state that `_checkpoint` wrote. Raises ConfigError if it is of another network."""
    try:
        tensors = {name: tensor.to(device) for name, tensor in safetensors.torch.load(checkpoint).items()}
        network = empty(**shape)
        network.load_state_dict({name: tensors[f"network.{name}"] for name in network.state_dict()}, assign=True)
        optimizer = _optimizer(network)
        optimizer.state = {name: tensors[f"optimizer.{name}"] for name in optimizer.state}
        averages = MovingAverages(tensors["count"], tensors["total"])
        return _State(network=network, averages=averages, optimizer=optimizer, reference=tensors["reference"])
    except (KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise ConfigError(f"the checkpoint is not one of this fit ({error}); fit from the start") from error
