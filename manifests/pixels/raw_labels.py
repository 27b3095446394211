"""Makes labels of a modality from the raw numbers of a file: scale, null marker, unit normals, range, dtype."""

import numpy as np

from manifests.errors import LabelError
from manifests.modality import Modality

_ROUNDING = 1e-3  # how far over their range a file's normals may be, as writers round
_NO_DIRECTION = 1e-6  # a normal shorter than this has none


def fit_array(
    modality: Modality,
    numbers: np.ndarray,
    scale: float | None = None,
    offset: float | None = None,
    null: float | None = None,
) -> np.ndarray:
    """Turns bool, integer or float numbers into a label of `modality`: its axes (h and w of any length), dtype, range.

    A label is number * scale + offset, rounded if the dtype is an integer. `null` is the number that stands for "no
    value here" in the file (in all channels of a pixel); it becomes the modality's null marker. So does what is not
    finite, if the marker is NaN. Unsigned normals without `scale` are n / largest * 2 - 1 with the middle (128, 128, 128) as
    null; all normals are made unit vectors, those without direction null.

    Raises LabelError if axes do not fit, or if a number is outside the modality's range.
    """
    axes = modality.axes.split()
    numbers = _with_axes(modality, numbers, axes)
    channel = axes.index("c") if "c" in axes else None
    is_normals = modality.crop_rule == "normals"
    values = numbers
    if is_normals and scale is None and numbers.dtype.kind == "u":
        largest = np.iinfo(numbers.dtype).max
        null = largest // 2 + 1 if null is None else null
        values = numbers / largest * 2 - 1
    elif scale is not None or offset is not None:
        values = numbers.astype(np.float64) * (1.0 if scale is None else scale) + (offset or 0.0)
    missing = np.zeros(numbers.shape, bool)
    if null is not None:
        missing = np.isnan(numbers) if np.isnan(null) else numbers == null
        if channel is not None and len(axes) > 1:
            missing = np.broadcast_to(missing.all(axis=channel, keepdims=True), numbers.shape)
    if is_normals:
        values, missing = _unit(modality, values.astype(np.float64), missing, axes.index("c"))
    if modality.null is not None and np.isnan(modality.null):
        missing = missing | ~np.isfinite(values)
    if np.dtype(modality.dtype).kind in "iu" and values.dtype.kind == "f":
        values = np.rint(values)
    _check_range(modality, values[~missing])
    marker = 0 if modality.null is None else modality.null
    return np.where(missing, marker, values).astype(modality.dtype)


def _with_axes(modality: Modality, numbers: np.ndarray, axes: list[str]) -> np.ndarray:
    """Returns the numbers with as many axes as the modality: a file may have or leave out the axis of a single channel."""
    if numbers.ndim == len(axes) - 1 and "c" in axes and modality.channels == 1:
        numbers = np.expand_dims(numbers, axes.index("c"))
    elif numbers.ndim == len(axes) + 1 and numbers.shape[-1] == 1:
        numbers = numbers[..., 0]
    if numbers.ndim != len(axes):
        raise LabelError(
            f"{modality.name}: numbers of shape {numbers.shape}, expected ({modality.axes}), such as {modality.shape()}"
        )
    return numbers


def _unit(modality: Modality, vectors: np.ndarray, missing: np.ndarray, channel: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns vectors of length 1, and which of them are missing or have no length."""
    # The range is checked before: afterwards every vector has length 1, so pixels of the wrong scale would pass.
    _check_range(modality, vectors[~missing], slack=_ROUNDING)
    length = np.linalg.norm(vectors, axis=channel, keepdims=True)
    missing = missing | np.broadcast_to(length < _NO_DIRECTION, vectors.shape)
    return vectors / np.maximum(length, _NO_DIRECTION), missing


def _check_range(modality: Modality, present: np.ndarray, slack: float = 0.0) -> None:
    lowest, highest = modality.range or (-np.inf, np.inf)
    if np.dtype(modality.dtype).kind in "iu":
        limits = np.iinfo(modality.dtype)
        lowest, highest = max(lowest, limits.min), min(highest, limits.max)
    if present.size and not (present.min() >= lowest - slack and present.max() <= highest + slack):
        raise LabelError(
            f"{modality.name}: numbers from {present.min()} to {present.max()}, expected {lowest} to {highest} "
            f"({modality.unit}); give scale, offset or null if the file means something else"
        )
