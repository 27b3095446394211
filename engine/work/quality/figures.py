"""Measures tokens and arrays; `engine/work/quality/records.py` has those of records and texts.

The same values give the same figures whatever the batches are: counts are exact, and sums are taken a row at a time and
then added without loss.
"""

import functools
import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from engine.work.machine import host
from manifests.modality import Modality

SAMPLED = 1024
"""About so many values of an array are looked at, always the same ones."""
_DIGITS = 6


class Figures(Protocol):
    """Takes the values of rows in, batch by batch, and tells their figures."""

    def add(self, values: Sequence[Any]) -> None: ...

    def finish(self) -> dict[str, float]: ...


def rounded(figures: Mapping[str, float]) -> dict[str, float]:
    """Returns figures with six significant digits, as they stand in the log; what is not finite is left out."""
    return {
        name: float(f"{value:.{_DIGITS}g}") for name, value in sorted(figures.items()) if math.isfinite(float(value))
    }


def entropy_bits(counts: np.ndarray) -> float:
    """Returns Shannon's entropy of counts, in bits; 0 if all are zero."""
    shares = counts[counts > 0] / max(int(counts.sum()), 1)
    return float(abs(np.sum(shares * np.log2(shares))))


class Copies:
    """Counts the rows that equal an earlier one."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._rows = 0

    def add(self, rows: Sequence[bytes | str]) -> None:
        self._rows += len(rows)
        self._seen.update(map(hash, rows))

    def finish(self) -> dict[str, float]:
        return {"duplicates": 1 - len(self._seen) / self._rows} if self._rows else {}


class Tokens:
    """Measures tokens: entropy, codebook use, copies; of sequences the longest, and how many are as long as they may be."""

    def __init__(self, modality: Modality, vocabulary: int) -> None:
        self._most = modality.tokens if modality.is_structured else None
        self._counts = np.zeros(vocabulary, np.int64)
        self._copies = Copies()
        self._outside = self._rows = self._at_limit = 0

    def add(self, values: Sequence[Any]) -> None:
        rows = [np.asarray(value, np.int64).ravel() for value in values]
        tokens = np.concatenate(rows)
        is_known = (tokens >= 0) & (tokens < len(self._counts))
        if not is_known.all():
            self._outside += int((~is_known).sum())
            tokens = tokens[is_known]
        self._counts += np.bincount(tokens, minlength=len(self._counts))
        self._copies.add([row.tobytes() for row in rows])
        self._rows += len(rows)
        if self._most is not None:
            self._at_limit += sum(len(row) >= self._most for row in rows)

    def finish(self) -> dict[str, float]:
        known = int(self._counts.sum())
        if not known + self._outside:
            return {}
        found = {
            "entropy_bits": entropy_bits(self._counts),
            "codebook_use": np.count_nonzero(self._counts) / len(self._counts),
            "out_of_range": self._outside / (known + self._outside),
            **self._copies.finish(),
        }
        return found if self._most is None else {**found, "at_limit": self._at_limit / self._rows}


class Arrays:
    """Measures pixels, maps and vectors: moments and extremes of what is finite and no null marker, shares of the rest."""

    def __init__(self, modality: Modality) -> None:
        self._modality = modality
        self._null = modality.null
        # Pixels are taken whole, and a null one is null in all its channels: one channel of a normal may well be 0.
        by_pixel = modality.axes.endswith(" c") and (modality.channels <= 4 or self._null is not None)
        self._together = modality.channels if by_pixel else 1
        self._copies = Copies()
        self._histogram = np.zeros(256, np.int64) if modality.dtype == "uint8" else None
        self._rows = self._flat = self._looked_at = self._nulls = self._not_finite = self._outside = self._counted = 0
        self._sums, self._squares = array("d"), array("d")
        self._shift: float | None = None
        self._min, self._max = math.inf, -math.inf

    def add(self, values: Sequence[Any]) -> None:
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) > 1:
            for value in values:
                self.add([value])
            return
        picked = host([self.sample(value) for value in values])
        self._rows += len(picked)
        self._looked_at += picked.size
        self._flat += int((picked == picked[:, :1]).all(axis=(1, 2)).sum()) if picked.size else 0
        self._copies.add([row.tobytes() for row in picked])
        if self._histogram is not None:
            self._histogram += np.bincount(picked.ravel(), minlength=256)
        else:
            self._measure(picked)

    def sample(self, value: Any) -> Any:
        """Returns a fixed sample of an array: (n, channels that are null together)."""
        units = value.reshape(-1, self._together)
        return units[:: _stride(units.shape[0], max(1, SAMPLED // self._together))]

    def _measure(self, picked: np.ndarray) -> None:
        numbers = picked.astype(np.float64)
        is_good = np.isfinite(numbers)
        if self._null is not None:
            equal = np.isnan(numbers) if math.isnan(self._null) else numbers == self._null
            is_null = equal.all(axis=2, keepdims=True)
            self._nulls += int(is_null.sum()) * picked.shape[2]
            self._not_finite += int((~is_good & ~is_null).sum())
            is_good &= ~is_null
        else:
            self._not_finite += int((~is_good).sum())
        good = numbers.ravel() if is_good.all() else numbers[is_good]
        self._counted += good.size
        if self._shift is None and good.size:
            # Squares are taken of distances to one of the values: large and nearly equal numbers keep their spread.
            self._shift = float(good[0])
        if self._shift is None or not good.size:
            return
        distances = (
            numbers - self._shift if good.size == numbers.size else np.where(is_good, numbers - self._shift, 0.0)
        )
        self._sums.extend(distances.sum(axis=(1, 2)))
        self._squares.extend(np.square(distances).sum(axis=(1, 2)))
        self._min, self._max = min(self._min, float(good.min())), max(self._max, float(good.max()))
        if self._modality.range is not None:
            least, most = self._modality.range
            self._outside += int(((good < least) | (good > most)).sum())

    def finish(self) -> dict[str, float]:
        if not self._looked_at:
            return {}
        found = {"flat": self._flat / self._rows, **self._copies.finish()}
        if self._histogram is not None:
            return {**found, **self._of_histogram(self._histogram)}
        found["not_finite"] = self._not_finite / self._looked_at
        if self._null is not None:
            found["null_values"] = self._nulls / self._looked_at
        if self._counted and self._shift is not None:
            mean = math.fsum(self._sums) / self._counted
            variance = math.fsum(self._squares) / self._counted - mean**2
            found |= {"min": self._min, "max": self._max, "mean": self._shift + mean, "std": max(variance, 0.0) ** 0.5}
            if self._modality.range is not None:
                found["out_of_range"] = self._outside / self._counted
        return found

    def _of_histogram(self, histogram: np.ndarray) -> dict[str, float]:
        counts = histogram.copy()
        found = {}
        if self._null is not None:
            marker = int(self._null)
            # Few bytes have channels that are null together; those count one by one.
            found["null_values"] = int(counts[marker]) / self._looked_at
            counts[marker] = 0
        total = int(counts.sum())
        if not total:
            return found
        levels = np.arange(256)
        seen = np.flatnonzero(counts)
        mean = float(levels @ counts) / total
        found |= {
            "min": int(seen[0]),
            "max": int(seen[-1]),
            "mean": mean,
            "std": (float(np.square(levels - mean) @ counts) / total) ** 0.5,
            "entropy_bits": entropy_bits(counts),
        }
        if self._modality.range not in (None, (0, 255)):
            least, most = self._modality.range
            found["out_of_range"] = int(counts[(levels < least) | (levels > most)].sum()) / total
        return found


@functools.cache
def _stride(size: int, wanted: int) -> int:
    """Returns the step that picks about so many of `size` things; the two share no factor, so that all columns are visited."""
    step = max(1, size // wanted)
    while step > 1 and math.gcd(step, size) > 1:
        step += 1
    return step
