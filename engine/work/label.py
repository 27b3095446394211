"""Makes labels of loaded rows: first by the labelers of whole photographs, then by those of crops.

Labelers of crops are given batches of one fixed size; rows that failed, and the rows after the last, are blanks in their
place, so that a row's labels never depend on what became of its neighbors.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.plan.corpus import CorpusPlan, LabelerUse, identity
from engine.plan.items import Target
from engine.work.inputs import WorkerSettings
from engine.work.isolate import MicroBatch, isolate, windows
from engine.work.machine import host, is_tensor, loaded_torch
from engine.work.marks import AtHand
from engine.work.models import Models, first_call
from engine.work.rows import ABSENT, Labels, LoadedRow, Needs, Outcome, failed
from labelers import protocol as labelers
from labelers.protocol import Labeler, check_label
from manifests.errors import LabelError
from manifests.formats.shards import Status
from manifests.modality import Modality
from manifests.pixels import crops


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Holds a labeler as it is used: its calls have at most `micro` rows; around those on a device `computing` is entered."""

    use: LabelerUse
    labeler: Labeler
    micro: MicroBatch
    on_device: bool
    computing: Callable[[], AbstractContextManager[Any]]


def load_labelers(plan: CorpusPlan, targets: Sequence[Target], models: Models, most: int) -> list[Loaded]:
    """Loads the labelers that these targets need, in the plan's order.

    A call has at most `most` rows, and fewer of a model for which memory ran out before.
    """
    return [
        Loaded(
            use=use,
            labeler=models.labeler(use),
            micro=models.micro(identity(use), most),
            on_device="device" in inspect.signature(labelers.find(use.name)).parameters,
            computing=models.computing,
        )
        for use in plan.uses_for(target.modality for target in targets)
    ]


class Labeling:
    """Holds the labelers of a corpus at work, for the crops that `targets` name. `at_hand` is told of each call."""

    def __init__(
        self, loaded: Sequence[Loaded], targets: Sequence[Target], settings: WorkerSettings, at_hand: AtHand
    ) -> None:
        self._of_photos = [one for one in loaded if one.labeler.spec.scope == "image"]
        self._of_crops = [one for one in loaded if one.labeler.spec.scope == "crop"]
        self._crop_numbers = tuple(sorted({target.crop for target in targets if target.crop is not None}))
        self._batch = settings.batch
        self._at_hand = at_hand
        # Crop-scope labelers see crops at the size of their outputs.
        self._sizes = tuple(sorted({one.use.outputs[0].size for one in self._of_crops}))
        # Modalities that are labeled on whole photographs and then cut into crops.
        self._cut_modalities = [
            kind for one in self._of_photos for kind in one.use.outputs if kind.token_grain == "crop"
        ]

    @property
    def needs(self) -> Needs:
        """Returns what must be loaded: photographs to be labeled, crops, or only the places of crops."""
        photo = any("image" in one.labeler.spec.inputs for one in self._of_photos)
        return Needs(decode=photo or bool(self._crop_numbers), photo=photo, crops=self._crop_numbers, sizes=self._sizes)

    @property
    def chunk(self) -> int:
        """Returns how many rows are loaded at once: as many whole photographs as their labelers take in a call."""
        of_photos = [one.labeler.spec.batch for one in self._of_photos if "image" in one.labeler.spec.inputs]
        return min(self._batch, max(of_photos)) if of_photos else self._batch

    def unit(self, places: Sequence[int], chunks: Iterator[list[LoadedRow]]) -> list[Labels]:
        """Returns labels of the next rows of `chunks`, which stand at these places of a batch; other places are blank."""
        pixels = {
            (number, size): np.zeros((self._batch, size, size, 3), np.uint8)
            for number in self._crop_numbers
            for size in self._sizes
        }
        labels: list[Labels] = []
        while len(labels) < len(places):
            # Photographs are let go of chunk by chunk: only their crops wait for the batch to fill.
            rows = next(chunks)
            made = [
                Labels(row=row.row, key=row.key, place=place)
                for row, place in zip(rows, places[len(labels) :], strict=False)
            ]
            for one in self._of_photos:
                self._label_photos(one, rows, made)
            for row, found in zip(rows, made, strict=True):
                self._cut(row, found)
                for key, cropped in row.pixels.items():
                    pixels[key][found.place] = cropped
            labels += made
            del rows, row
        for number in self._crop_numbers:
            for one in self._of_crops:
                self._label_crops(one, labels, number, pixels[number, one.use.outputs[0].size])
        return labels

    def _label_photos(self, one: Loaded, rows: Sequence[LoadedRow], labels: Sequence[Labels]) -> None:
        """Calls one labeler of whole photographs, with those rows that have what it needs."""
        spec, outputs = one.labeler.spec, one.use.outputs
        ready = []
        for at, (row, made) in enumerate(zip(rows, labels, strict=True)):
            problem = _problem(spec.inputs, row, made)
            if problem is None:
                ready.append(at)
            else:
                made.sample.update({kind.name: problem for kind in outputs})

        def call(asked: Sequence[int]) -> list[dict[str, Any]]:
            made: list[dict[str, Any]] = []
            most = min(spec.batch, one.micro.size)
            for first in range(0, len(asked), most):
                some = asked[first : first + most]
                inputs = {name: [_input(name, rows[at], labels[at]) for at in some] for name in spec.inputs}
                if "image" in inputs:
                    # True sizes, which a scaled decode does not show.
                    inputs["size"] = [rows[at].size for at in some]
                with self._call(one, [rows[at].row for at in some]):
                    found = one.labeler.label(inputs)
                    values = {kind.name: _on_host(_made(found, kind), kind, len(some)) for kind in outputs}
                made += [{name: value[at] for name, value in values.items()} for at in range(len(some))]
            return made

        for at, outcome in isolate(call, ready, "label", one.micro).items():
            for kind in outputs:
                labels[at].sample[kind.name] = _checked(kind, outcome, any_size=True)

    @contextmanager
    def _call(self, one: Loaded, rows: Sequence[int]) -> Iterator[None]:
        with (
            self._at_hand.call("label", rows, one.use.name),
            first_call(one.use.name),
            one.computing() if one.on_device else nullcontext(),
        ):
            yield

    def _cut(self, row: LoadedRow, labels: Labels) -> None:
        """Cuts crops of what was labeled on the whole photograph; crops of a row without one get its problem, or are absent."""
        for number in self._crop_numbers:
            found = labels.crop.setdefault(number, {})
            crop = row.cuts.get(number)
            if crop is None:
                nothing = row.problem or ABSENT
                found.update({kind.name: nothing for one in self._of_crops for kind in one.use.outputs})
                found.update({kind.name: nothing for kind in self._cut_modalities})
                continue
            for kind in self._cut_modalities:
                found[kind.name] = _cut_label(kind, labels.sample[kind.name], crop)

    def _label_crops(self, one: Loaded, batch: Sequence[Labels], number: int, images: np.ndarray) -> None:
        """Calls one labeler of crops with the crops of one number, (batch, size, size, 3) with blanks between them.

        A model's output may differ in its last bits with the shape of its input, and a row's with its place. So every call
        has one fixed shape, and a row one fixed place in it, whichever of its neighbors failed, are suspects or are done.
        """
        outputs, names = one.use.outputs, one.labeler.spec.inputs
        at_place = {made.place: made for made in batch}
        ready = [made.place for made in batch if outputs[0].name not in made.crop[number]]

        def call(places: Sequence[int]) -> list[dict[str, Any]]:
            # Asked of all rows at first, then of halves of them, to find those that raise: the others are blank.
            made: list[dict[str, Any]] = []
            size = one.micro.size
            for first, some in windows(places, self._batch, size):
                pixels = _window(images, some, first, size, whole=len(places) == len(ready))
                inputs = {
                    name: pixels if name == "image" else _labels_of(name, at_place, number, some, first, size)
                    for name in names
                }
                with self._call(one, [at_place[place].row for place in some]):
                    found = one.labeler.label(inputs)
                    values = {kind.name: _in_place(_made(found, kind), kind, size) for kind in outputs}
                made += [{name: value[place - first] for name, value in values.items()} for place in some]
            return made

        for place, outcome in isolate(call, ready, "label", one.micro).items():
            for kind in outputs:
                at_place[place].crop[number][kind.name] = _checked(kind, outcome)


def on_host(found: dict[int, Outcome]) -> dict[int, Outcome]:
    """Returns labels of one modality as NumPy arrays, in one copy from whatever device they are on."""
    tensors = {row: outcome for row, outcome in found.items() if is_tensor(outcome.value)}
    if not tensors:
        return found
    arrays = host([outcome.value for outcome in tensors.values()])
    moved = {row: replace(outcome, value=array) for (row, outcome), array in zip(tensors.items(), arrays, strict=True)}
    return found | moved


def _problem(inputs: Sequence[str], row: LoadedRow, labels: Labels) -> Outcome | None:
    """Returns why a row cannot be given to a labeler with these inputs, None if it can."""
    # A photograph that cannot be decoded still has a caption; a document that cannot be read has nothing.
    if row.problem is not None and ("image" in inputs or not row.readable):
        return row.problem
    for name in inputs:
        if name not in ("image", "columns", "source") and labels.sample[name].status is Status.FAILED:
            return labels.sample[name]
    return None


def _input(name: str, row: LoadedRow, labels: Labels) -> Any:
    match name:
        case "image":
            return row.image
        case "columns":
            return row.columns
        case "source":
            return row.uri
    return labels.sample[name].value


def _window(images: np.ndarray, places: Sequence[int], first: int, size: int, *, whole: bool) -> np.ndarray:
    """Returns `size` rows of a batch from `first` on, blank but at `places`; `whole`: the others are blank already."""
    if whole and first + size <= len(images):
        return images[first : first + size]
    blanked = np.zeros((size, *images.shape[1:]), images.dtype)
    for place in places:
        blanked[place - first] = images[place]
    return blanked


def _labels_of(
    name: str, batch: Mapping[int, Labels], number: int, places: Sequence[int], first: int, size: int
) -> list[Any]:
    """Returns labels of another modality as a labeler of crops gets them: the crop's, else the sample's, else None."""
    values: list[Any] = [None] * size
    for place in places:
        outcome = batch[place].crop[number].get(name) or batch[place].sample.get(name) or ABSENT
        values[place - first] = host([outcome.value])[0] if is_tensor(outcome.value) else outcome.value
    return values


def _made(found: Mapping[str, Sequence[Any]], kind: Modality) -> Sequence[Any]:
    """Returns a labeler's labels of one modality; labelers do not know of an `@size`."""
    return found[kind.name] if kind.name in found else found[kind.base_name]


def _on_host(made: Any, kind: Modality, count: int) -> Sequence[Any]:
    """Returns labels of whole photographs as NumPy arrays, to be cut into crops. Raises LabelError if their number is wrong."""
    if len(made) != count:
        raise LabelError(f"{kind.name}: {len(made)} labels for {count} photographs")
    return [host([value])[0].astype(kind.dtype, copy=False) if is_tensor(value) else value for value in made]


def _in_place(made: Any, kind: Modality, count: int) -> Sequence[Any]:
    """Returns labels of crops: a tensor stays one, in the modality's dtype; rows that are not finite become their error.

    Raises LabelError if their number is wrong.
    """
    if len(made) != count:
        raise LabelError(f"{kind.name}: {len(made)} labels for a batch of {count}")
    if not is_tensor(made):
        return made
    made = made.detach()
    if not made.is_floating_point():
        return made
    if np.dtype(kind.dtype).kind == "f":
        # Models under autocast answer in what they compute in.
        made = made.to(getattr(loaded_torch(), kind.dtype))
    if kind.null != kind.null:
        return made
    wrong = (~made.isfinite()).flatten(1).sum(1).tolist()
    message = f"{kind.name}: the label holds {{}} values that are NaN or infinite"
    return [LabelError(message.format(count)) if count else row for row, count in zip(made, wrong, strict=True)]


def _checked(kind: Modality, outcome: Outcome, *, any_size: bool = False) -> Outcome:
    """Checks one modality of a labeler's outcome against the modality's facts."""
    if outcome.status is not Status.OK:
        return outcome
    value = outcome.value[kind.name]
    if value is None:
        return ABSENT
    try:
        if isinstance(value, LabelError):
            raise value
        if is_tensor(value):
            _check_tensor(kind, value)
        else:
            check_label(kind, value, any_size=any_size)
    except Exception as error:
        return failed("label", error)
    return Outcome(Status.OK, value)


def _check_tensor(kind: Modality, value: Any) -> None:
    """Checks as `check_label`, without a copy from the device; whether all is finite was asked of the batch."""
    dtype = str(value.dtype).removeprefix("torch.")
    if tuple(value.shape) != kind.shape() or dtype != kind.dtype:
        raise LabelError(
            f"{kind.name}: the label is {dtype} {tuple(value.shape)}, expected {kind.dtype} ({kind.axes}) = {kind.shape()}"
        )


def _cut_label(kind: Modality, outcome: Outcome, crop: crops.Crop) -> Outcome:
    if outcome.status is not Status.OK:
        return outcome
    try:
        return Outcome(Status.OK, crops.crop_label(kind, outcome.value, crop, kind.size // kind.stride))
    except Exception as error:
        return failed("label", error)
