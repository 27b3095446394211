"""Measures a shard as its rows are made: its values (`figures.py`, `records.py`), and how modalities agree.

They go into the shard's record, and so into the views `quality` and `alarms`; `docs/quality.md` says what each means.
Nothing here raises: what cannot be measured has no figures.
"""

import logging
import math
from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.work.machine import host
from engine.work.quality.figures import Arrays, Figures, Tokens, rounded
from engine.work.quality.records import RecordMetrics, Texts
from manifests.formats.shards import Status
from manifests.modality import Form, Modality

if TYPE_CHECKING:
    from engine.work.rows import Labels

CAPTION_EMBEDDING = "clip_caption"
"""The modality that holds a caption's CLIP embedding, if somebody brings one: no labeler here makes it."""
_log = logging.getLogger(__name__)
_PIXEL_STEP = 16
_BOX_STEPS = 16
_MOST_BOXES = 8


class ShardQuality:
    """Measures one shard: its values, and the labels behind its tokens if no shard keeps those."""

    def __init__(self, modality: Modality, form: Form, vocabulary: int | None = None) -> None:
        """Takes the `vocabulary` of tokens, None for labels."""
        self._figures: Figures | None = Tokens(modality, vocabulary or 1) if form == "token" else _figures_of(modality)
        self._of_labels: Figures | None = _figures_of(modality) if form == "token" else None

    def add(self, values: Sequence[Any | None], labels: Sequence[Any | None] = ()) -> None:
        """Takes the next rows' values as they are written, None if a row is null.

        `labels` are what tokens were made of, if no shard of labels is written: NumPy arrays, or torch tensors of one
        shape on any device.
        """
        self._figures = _added(self._figures, values)
        if labels:
            self._of_labels = _added(self._of_labels, labels)

    def finish(self) -> dict[str, float]:
        """Returns the figures by name; those of the labels behind tokens start with `label_`. Empty if nothing was measured."""
        of_labels = {f"label_{name}": value for name, value in _finished(self._of_labels).items()}
        return {**_finished(self._figures), **of_labels}


def _figures_of(modality: Modality) -> Figures:
    if modality.kind == "text":
        return Texts()
    return RecordMetrics(modality) if modality.is_structured else Arrays(modality)


def _added(figures: Figures | None, values: Sequence[Any | None]) -> Figures | None:
    """Returns the figures with more values in; None if one of these cannot be measured: then nothing is told."""
    present = [value for value in values if value is not None]
    if figures is not None and present:
        try:
            figures.add(present)
        except Exception as error:
            _log.warning("values are not measured: %s: %s", type(error).__name__, error)
            return None
    return figures


def _finished(figures: Figures | None) -> dict[str, float]:
    try:
        found = {} if figures is None else figures.finish()
    except Exception as error:
        _log.warning("values are not measured: %s: %s", type(error).__name__, error)
        return {}
    return rounded(found)


class CrossModal:
    """Measures how far modalities of the same crops agree, if one work item makes them together, over all its crops.

    Figures stand with the second of each pair: normals `agreement_with_depth`, segmentation `agreement_with_boxes`, and
    the captions' embedding `agreement_with_clip_global`.
    """

    def __init__(self) -> None:
        self._normals: dict[str, _Angles] = {}
        self._segmentation: dict[str, _Boxes] = {}
        self._captions = _Angles()

    def add(self, batch: Sequence["Labels"]) -> None:
        """Takes the next rows, with all their labels."""
        try:
            crops = [
                {**_present(labels.sample), **_present(found)} for labels in batch for found in labels.crop.values()
            ]
            self._add(crops)
        except Exception as error:
            _log.warning("agreement is not measured: %s: %s", type(error).__name__, error)

    def _add(self, crops: Sequence[Mapping[str, Any]]) -> None:
        pairs: dict[str, list[tuple[Any, Any]]] = {}
        for labels in crops:
            for name, value in labels.items():
                base, _, size = name.partition("@")
                if base == "normals" and (depth := labels.get(f"depth@{size}" if size else "depth")) is not None:
                    pairs.setdefault(name, []).append((depth, value))
                elif base == "segmentation" and (boxes := labels.get("boxes")):
                    self._segmentation.setdefault(name, _Boxes()).add(boxes, value)
                elif name == CAPTION_EMBEDDING and (image := labels.get("clip_global")) is not None:
                    self._captions.add(cosine(host([image]), host([value])))
        for name, found in pairs.items():
            self._normals.setdefault(name, _Angles()).add(depth_normal_agreement(found))

    def finish(self) -> dict[str, dict[str, float]]:
        """Returns the figures by modality and name; none of a modality that was compared with nothing."""
        found = {name: {"agreement_with_depth": angles.mean} for name, angles in self._normals.items()}
        found |= {name: {"agreement_with_boxes": boxes.agreement} for name, boxes in self._segmentation.items()}
        found[CAPTION_EMBEDDING] = {"agreement_with_clip_global": self._captions.mean}
        kept = {name: rounded(figures) for name, figures in found.items()}
        return {name: figures for name, figures in kept.items() if figures}


def _present(outcomes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: outcome.value for name, outcome in outcomes.items() if outcome.status is Status.OK}


class _Angles:
    """Holds the mean of cosines, row by row; NaN stands for what could not be compared."""

    def __init__(self) -> None:
        self._sums = array("d")
        self._count = 0

    def add(self, cosines: np.ndarray) -> None:
        for row in cosines.reshape(len(cosines), -1):
            finite = row[np.isfinite(row)]
            self._sums.append(float(finite.sum()))
            self._count += len(finite)

    @property
    def mean(self) -> float:
        return math.fsum(self._sums) / self._count if self._count else math.nan


def cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns cosines of vectors (..., c) and (..., c), NaN if one has no length or is not finite."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    with np.errstate(all="ignore"):
        return (one * other).sum(-1) / (np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1))


def depth_normal_agreement(pairs: Sequence[tuple[Any, Any]]) -> np.ndarray:
    """Returns cosines between labeled normals and those of the surface that depth describes: (B, places), NaN if unknown.

    `pairs` are depth (h, w) and normals (h, w, 3) of one size; every sixteenth pixel each way is looked at. Depth is
    taken as seen by a camera whose focal length is the crop's width (a view of 53 degrees): its scale does not matter.
    With x right, y down and z away from the camera, the surface z(u, v) has the normal
    (f z_u, f z_v, -(z + (u - c) z_u + (v - c) z_v)), towards the camera.
    """
    height, width = pairs[0][0].shape
    step, inner = _PIXEL_STEP, slice(1, -1, _PIXEL_STEP)
    before, after = slice(0, -2, step), slice(2, None, step)
    depths = [depth for depth, _ in pairs]
    z, left, right, up, down = (
        host([depth[rows, columns] for depth in depths]).astype(np.float64)
        for rows, columns in ((inner, inner), (inner, before), (inner, after), (before, inner), (after, inner))
    )
    labeled = host([normals[inner, inner] for _, normals in pairs])
    with np.errstate(all="ignore"):
        z_u, z_v = (right - left) / 2, (down - up) / 2
        u = np.arange(height)[inner][:, None] * 0 + np.arange(width)[inner] - (width - 1) / 2
        v = np.arange(height)[inner][:, None] - (height - 1) / 2
        surface = np.stack([width * z_u, width * z_v, -(z + u * z_u + v * z_v)], axis=-1)
    surface[~(z > 0)] = np.nan
    return cosine(surface, labeled).reshape(len(pairs), -1)


class _Boxes:
    """Measures the share of boxes' areas that carries their class in a segmentation.

    A class that is a number is that class index. Of any other name it is the index that its boxes hold most of, over what
    the whole maps hold of it, so that a background that is everywhere is nobody's class.
    """

    def __init__(self) -> None:
        self._inside: dict[str, np.ndarray] = {}
        self._everywhere = np.zeros(256)
        self._maps = 0

    def add(self, boxes: Sequence[Mapping[str, Any]], classes: Any) -> None:
        index = host([classes])[0]
        height, width = index.shape
        self._maps += 1
        self._everywhere += _shares(index[::_PIXEL_STEP, ::_PIXEL_STEP])
        for box in boxes[:_MOST_BOXES]:
            top, bottom = _span(box["y0"], box["y1"], height)
            left, right = _span(box["x0"], box["x1"], width)
            steps = max(1, (bottom - top) // _BOX_STEPS), max(1, (right - left) // _BOX_STEPS)
            shares = _shares(index[top : bottom : steps[0], left : right : steps[1]])
            name = str(box["class"])
            self._inside[name] = self._inside.get(name, 0) + shares

    @property
    def agreement(self) -> float:
        carried = total = 0.0
        for name, shares in sorted(self._inside.items()):
            known = float(shares.sum())
            if name.isdecimal() and int(name) < len(shares):
                index = int(name)
            else:
                index = int(np.argmax(shares - known * self._everywhere / self._maps))
            carried += float(shares[index])
            total += known
        return carried / total if total else math.nan


def _shares(index: np.ndarray) -> np.ndarray:
    """Returns the share of each class index (256,) in a map."""
    return np.bincount(index.ravel(), minlength=256)[:256] / max(index.size, 1)


def _span(start: float, end: float, length: int) -> tuple[int, int]:
    """Returns fractions as a range of pixels, at least one."""
    first = min(max(int(start * length), 0), length - 1)
    return first, min(max(math.ceil(end * length), first + 1), length)
