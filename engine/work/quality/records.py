"""Measures records and texts, as `engine/work/quality/figures.py` measures tokens and arrays."""

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from engine.work.quality.figures import Copies, entropy_bits
from manifests.modality import Modality

_SCORE_BINS = 10
# Corners that float32 rounds over the edge are in range.
_ROUNDING = 1e-6


class _Mean:
    """Holds the mean of numbers that come a row at a time; what is no finite number is counted apart."""

    def __init__(self) -> None:
        self._sums = array("d")
        self._count = 0
        self.numbers = self.not_finite = 0

    def add(self, row: Iterable[Any]) -> None:
        numbers = [float(value) for value in row if value is not None]
        finite = [number for number in numbers if math.isfinite(number)]
        self.numbers += len(numbers)
        self.not_finite += len(numbers) - len(finite)
        self._sums.append(math.fsum(finite))
        self._count += len(finite)

    @property
    def value(self) -> float:
        return math.fsum(self._sums) / self._count if self._count else math.nan


class Texts:
    """Measures texts: lengths, empty ones, copies."""

    def __init__(self) -> None:
        self._chars, self._words = _Mean(), _Mean()
        self._copies = Copies()
        self._rows = self._empty = 0

    def add(self, values: Sequence[str]) -> None:
        self._rows += len(values)
        self._copies.add(values)
        for text in values:
            words = len(text.split())
            self._empty += not words
            self._chars.add((len(text),))
            self._words.add((words,))

    def finish(self) -> dict[str, float]:
        if not self._rows:
            return {}
        lengths = {"chars": self._chars.value, "words": self._words.value}
        return {**lengths, "empty": self._empty / self._rows, **self._copies.finish()}


class RecordMetrics:
    """Measures records: how many a row has, their scores, boxes and classes, and means of their other numbers.

    A record that stands alone has a mean of each numeric field, one of many of each float field.
    """

    def __init__(self, modality: Modality) -> None:
        self._modality = modality
        special = {"score", "x0", "y0", "x1", "y1"}
        kinds = ("float",) if modality.many else ("float", "int", "uint")
        self._means = {
            name: _Mean() for name, kind in modality.fields.items() if name not in special and kind.startswith(kinds)
        }
        self._scores, self._areas = _Mean(), _Mean()
        self._histogram: Counter[int] = Counter()
        self._classes: Counter[str] = Counter()
        self._rows = self._records = self._empty = self._outside = 0

    def add(self, values: Sequence[Any]) -> None:
        fields = self._modality.fields
        for value in values:
            records = value if self._modality.many else [value]
            self._rows += 1
            self._records += len(records)
            self._empty += not records
            for name, mean in self._means.items():
                mean.add([record[name] for record in records])
            if "score" in fields:
                self._add_scores([record["score"] for record in records])
            if "class" in fields:
                self._classes.update([record["class"] for record in records])
            if "x0" in fields:
                self._add_boxes(records)

    def _add_scores(self, scores: Sequence[float | None]) -> None:
        self._scores.add(scores)
        finite = [score for score in scores if score is not None and math.isfinite(score)]
        self._histogram.update([min(max(int(score * _SCORE_BINS), 0), _SCORE_BINS - 1) for score in finite])

    def _add_boxes(self, records: Sequence[Mapping[str, Any]]) -> None:
        least, most = self._modality.range or (-math.inf, math.inf)
        least, most = least - _ROUNDING, most + _ROUNDING
        corners = [(box["x0"], box["y0"], box["x1"], box["y1"]) for box in records]
        # What is NaN is in no order.
        self._outside += sum(not (least <= x0 < x1 <= most and least <= y0 < y1 <= most) for x0, y0, x1, y1 in corners)
        self._areas.add([(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in corners])

    def finish(self) -> dict[str, float]:
        if not self._rows:
            return {}
        found = {f"mean_{name}": mean.value for name, mean in self._means.items()}
        measured = [*self._means.values(), self._scores, self._areas]
        numbers = sum(mean.numbers for mean in measured)
        if numbers:
            found["not_finite"] = sum(mean.not_finite for mean in measured) / numbers
        if self._modality.many:
            found |= {"records": self._records / self._rows, "empty": self._empty / self._rows}
        if "class" in self._modality.fields:
            found["classes"] = len(self._classes)
            found["class_entropy_bits"] = entropy_bits(np.array([*self._classes.values()], np.int64))
        if "score" in self._modality.fields:
            found["score_mean"] = self._scores.value
            found |= {f"score_hist_{place}": count for place, count in self._histogram.items()}
        if "x0" in self._modality.fields and self._records:
            found |= {"box_area": self._areas.value, "out_of_range": self._outside / self._records}
        return found
