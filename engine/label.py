"""Labels of loaded rows: labelers of whole photographs, then crops, then labelers of crops.

Rows go through in batches of one fixed size; rows that failed, and the rows after the last, are blanks in their place, so
that a row's labels never depend on what became of its neighbors.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from engine.corpus_plan import CorpusPlan, LabelerUse
from engine.decode import LoadedRow
from engine.failures import ABSENT, Outcome, failed, isolate
from labelers.protocol import Labeler, check_label
from manifests import crops
from manifests.modality import Modality
from manifests.shards import Status


@dataclass(frozen=True, kw_only=True)
class Labels:
    """All labels of one row: of the sample (whole photograph), and of each crop, by modality."""

    row: int
    key: str
    sample: dict[str, Outcome] = field(default_factory=dict)
    crop: dict[int, dict[str, Outcome]] = field(default_factory=dict)


class Labeling:
    """The labelers of a corpus at work, for the crops asked for."""

    def __init__(
        self, plan: CorpusPlan, loaded: Sequence[tuple[LabelerUse, Labeler]], crop_numbers: Sequence[int], batch: int
    ) -> None:
        self._plan = plan
        self._of_photos = [(use, labeler) for use, labeler in loaded if labeler.spec.scope == "image"]
        self._of_crops = [(use, labeler) for use, labeler in loaded if labeler.spec.scope == "crop"]
        self._crop_numbers = crop_numbers
        self._batch = batch
        # Crop-scope labelers see crops at the size of their outputs.
        self._sizes = sorted({use.outputs[0].size for use, _ in self._of_crops})

    @property
    def needs_image(self) -> bool:
        """Whether photographs must be decoded: to be labeled, or to know where their crops lie."""
        return bool(self._crop_numbers) or any("image" in labeler.spec.inputs for _, labeler in self._of_photos)

    def run(self, rows: Iterable[LoadedRow]) -> Iterator[list[Labels]]:
        """Labels of the rows, in order, a batch at a time."""
        stream = iter(rows)
        while True:
            batch: list[Labels] = []
            pixels = {
                (number, size): np.zeros((self._batch, size, size, 3), np.uint8)
                for number in self._crop_numbers
                for size in self._sizes
            }
            # Photographs are let go of one by one: only their crops wait for the batch to fill.
            for place, row in enumerate(islice(stream, self._batch)):
                labels = Labels(row=row.row, key=row.key)
                self._label_photo(row, labels)
                self._cut(row, labels, {key: array[place] for key, array in pixels.items()})
                batch.append(labels)
            if not batch:
                return
            for number in self._crop_numbers:
                self._label_crops(batch, number, pixels)
            yield batch
            if len(batch) < self._batch:
                return

    def _label_photo(self, row: LoadedRow, labels: Labels) -> None:
        for use, labeler in self._of_photos:
            inputs: dict[str, list[Any]] = {}
            # A photograph that cannot be decoded still has a caption; a document that cannot be read has nothing.
            problem = row.problem if "image" in labeler.spec.inputs or not row.readable else None
            for name in labeler.spec.inputs:
                if name == "image":
                    inputs[name] = [row.image]
                elif name in ("columns", "source"):
                    inputs[name] = [row.columns if name == "columns" else row.uri]
                else:
                    given = labels.sample[name]
                    problem = problem or (given if given.status is Status.FAILED else None)
                    inputs[name] = [given.value]
            labels.sample.update({output.name: problem or ABSENT for output in use.outputs})
            if problem is None:
                _store(labels.sample, use, labeler, inputs)

    def _cut(self, row: LoadedRow, labels: Labels, pixels: Mapping[tuple[int, int], np.ndarray]) -> None:
        """Cuts the row's crops: pixels for crop-scope labelers, and labels of the photograph by their rules."""
        for number in self._crop_numbers:
            found = labels.crop.setdefault(number, {})
            if row.image is None:
                nothing = row.problem or ABSENT
                found.update({output.name: nothing for use, _ in self._of_crops for output in use.outputs})
                found.update({kind.name: nothing for kind in self._cut_modalities()})
                continue
            height, width = row.image.shape[:2]
            crop = crops.plan_crop(self._plan.rule, row.key, number, width, height)
            for (crop_number, size), target in pixels.items():
                if crop_number == number:
                    target[:] = crops.crop_pixels(row.image, crop, size)
            for kind in self._cut_modalities():
                found[kind.name] = _cut_label(kind, labels.sample[kind.name], crop)

    def _cut_modalities(self) -> list[Modality]:
        """The modalities labeled on whole photographs of which crops are made."""
        return [kind for use, _ in self._of_photos for kind in use.outputs if kind.token_grain == "crop"]

    def _label_crops(self, batch: Sequence[Labels], number: int, pixels: Mapping[tuple[int, int], np.ndarray]) -> None:
        for use, labeler in self._of_crops:
            first = use.outputs[0]
            images = pixels[number, first.size]
            ready = [place for place in range(len(batch)) if first.name not in batch[place].crop[number]]

            def call(
                places: Sequence[int], labeler: Labeler = labeler, use: LabelerUse = use, images: np.ndarray = images
            ):
                blanked = _only(images, places)
                inputs = {
                    name: blanked if name == "image" else _inputs(name, batch, number, self._batch, places)
                    for name in labeler.spec.inputs
                }
                found = labeler.label(inputs)
                return [{kind.name: _made(found, kind)[place] for kind in use.outputs} for place in places]

            for place, outcome in isolate(call, ready, "label").items():
                for kind in use.outputs:
                    batch[place].crop[number][kind.name] = _checked(kind, outcome)


def _only(images: np.ndarray, places: Sequence[int]) -> np.ndarray:
    """The batch with every row but these blank; itself where no other row has anything in it."""
    if len(places) == len(images):
        return images
    blanked = np.zeros_like(images)
    blanked[list(places)] = images[list(places)]
    return blanked


def _inputs(name: str, batch: Sequence[Labels], number: int, size: int, places: Sequence[int]) -> list[Any]:
    """Labels of other modalities as a crop-scope labeler gets them: the crop's, else the sample's; None elsewhere."""
    values: list[Any] = [None] * size
    for place in places:
        outcome = batch[place].crop[number].get(name) or batch[place].sample.get(name) or ABSENT
        values[place] = outcome.value
    return values


def _made(found: Mapping[str, Sequence[Any]], kind: Modality) -> Sequence[Any]:
    """A labeler's labels of one modality; labelers know nothing of an `@size`."""
    return found[kind.name] if kind.name in found else found[kind.base_name]


def _store(into: dict[str, Outcome], use: LabelerUse, labeler: Labeler, inputs: Mapping[str, list[Any]]) -> None:
    """Labels one photograph and stores what comes of it."""
    try:
        found = labeler.label(inputs)
        values = [(kind, _made(found, kind)[0]) for kind in use.outputs]
    except Exception as error:
        into.update({kind.name: failed("label", error) for kind in use.outputs})
        return
    for kind, value in values:
        into[kind.name] = _checked(kind, Outcome(Status.OK, {kind.name: value}), any_size=True)


def _checked(kind: Modality, outcome: Outcome, *, any_size: bool = False) -> Outcome:
    """One modality of a labeler's outcome, checked against the modality's facts."""
    if outcome.status is not Status.OK:
        return outcome
    value = outcome.value[kind.name]
    if value is None:
        return ABSENT
    try:
        check_label(kind, value, any_size=any_size)
    except Exception as error:
        return failed("label", error)
    return Outcome(Status.OK, value)


def _cut_label(kind: Modality, outcome: Outcome, crop: crops.Crop) -> Outcome:
    if outcome.status is not Status.OK:
        return outcome
    try:
        return Outcome(Status.OK, crops.crop_label(kind, outcome.value, crop, kind.size))
    except Exception as error:
        return failed("label", error)
