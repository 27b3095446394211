"""Defines what a labeler is, and finds one by its name.

A labeler's file holds one class, named as `LABELER` at its end. The class has a `spec` and two methods: the
constructor loads (its keyword arguments are the parameters of the pipeline file; `Annotated[int, "..."]` tells what one
means), `label` labels.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol, get_args, get_origin, runtime_checkable

from manifests.errors import ConfigError, LabelError, nearest
from manifests.modality import Modality


@dataclass(frozen=True, kw_only=True)
class LabelerSpec:
    """Holds the facts of a labeler that are known before anything is loaded.

    name         the file's name, or `module:Class` for one of your own
    version      an integer, raised by hand when outputs change
    scope        `image`: runs once on the whole photograph at its own aspect, and its labels are then cropped by the
                 rule of their modality; `crop`: runs on every crop
    inputs       names of what `label` is given: `image`; `columns` (the source columns); `source` (URI of the
                 photograph); or the name of a modality whose label it needs
    outputs      the modalities it makes; None for a labeler that makes the modality that its constructor is given as
                 `modality`
    batch        the most rows a call may have (a labeler of crops is always given the engine's batch)
    checkpoint   default weights (hub id, folder, file or URI), None for a labeler without weights. A labeler with weights
                 has a parameter `checkpoint`: it gets a local path, and the recipe gets the digest of the files there
    requires     import names of the packages it needs beyond the base
    heavy        whether it is slow or of uneven cost; such a labeler gets work items of its own
    """

    name: str
    version: int
    scope: Literal["image", "crop"]
    outputs: tuple[str, ...] | None
    inputs: tuple[str, ...] = ("image",)
    batch: int = 1
    checkpoint: str | None = None
    licence_code: str = "Apache-2.0"
    licence_weights: str | None = None
    requires: tuple[str, ...] = ()
    heavy: bool = False


@dataclass(frozen=True, kw_only=True)
class LabelerParameter:
    """Describes a parameter of a labeler.

    `default` is `inspect.Parameter.empty` if it must be given, and so is `annotation` if its type is not told; `meaning` is
    empty if the labeler does not tell it.
    """

    name: str
    annotation: Any
    default: Any
    meaning: str

    @property
    def is_required(self) -> bool:
        return self.default is inspect.Parameter.empty


@runtime_checkable
class Labeler(Protocol):
    """Defines what the engine asks of a labeler: arrays in, arrays out."""

    spec: ClassVar[LabelerSpec]

    def label(self, batch: Mapping[str, Any]) -> Mapping[str, Sequence[Any]]:
        """Returns the labels of a batch of B rows: for each output modality a sequence of B labels.

        `batch` has one entry for each of `spec.inputs`, B long:

            image    scope `image`: a list of uint8 arrays (h, w, 3), sRGB; scope `crop`: one uint8 array (B, s, s, 3)
            size     comes with `image` of scope `image`: a list of (width, height) of the photographs themselves, which
                     may have been decoded smaller
            columns  a list of dicts, source column to value
            source   a list of URIs
            NAME     a list of labels of that modality, with None for a row that has no such label

        A label is an array of the modality's axes and dtype, a str for kind `text`, a dict for a structured modality
        or a list of dicts if the modality is `many`. A labeler of crops may return one torch tensor (B, ...) on its device
        instead of arrays: it is tokenized there, and copied only if labels are kept. None says that the source has no such
        label for the row (`absent`).
        Crops come in batches of one fixed size: a row that failed, and an empty place at the end, is a black crop (all 0)
        whose input labels are None. A labeler must not raise for it; its label is thrown away.
        Row i of the result depends on row i of the batch alone, and equal calls give equal results. If `label` raises, the
        engine finds the row that caused it, and that row alone fails.
        """
        ...


def names() -> list[str]:
    """Returns the names of all labelers: the files of this folder."""
    import labelers

    shared = ("pretrained", "protocol")
    return sorted(module.name for module in pkgutil.iter_modules(labelers.__path__) if module.name not in shared)


def find(name: str) -> type[Labeler]:
    """Returns the labeler class called `name`: a file of this folder, or `my_module:MyLabeler`.

    Raises ConfigError with the nearest known name, or with the package that is missing.
    """
    if ":" in name:
        module_name, _, attribute = name.partition(":")
    else:
        if name not in names():
            raise ConfigError(f"unknown labeler {name!r}; {nearest(name, names())}; your own: my_module:MyLabeler")
        module_name, attribute = f"labelers.{name}", "LABELER"
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"labeler {name!r} cannot be imported: {error}; the folder of a module of your own must be in PYTHONPATH (of "
            "workers on a cluster: engine.runtime_env, see docs/cluster.md)"
        ) from error
    if not isinstance(getattr(found, "spec", None), LabelerSpec):
        raise ConfigError(f"labeler {name!r} has no `spec` of type LabelerSpec")
    return found


def described(labeler: type[Labeler]) -> list[LabelerParameter]:
    """Returns the parameters that a pipeline file can give a labeler, in the order of its constructor."""
    found = []
    for name, parameter in _signature(labeler).items():
        if name == "modality" and labeler.spec.outputs is None:
            continue  # The engine gives it.
        is_told = get_origin(parameter.annotation) is Annotated
        kind, *notes = get_args(parameter.annotation) if is_told else (parameter.annotation,)
        meaning = next((note for note in notes if isinstance(note, str)), "")
        found.append(LabelerParameter(name=name, annotation=kind, default=parameter.default, meaning=meaning))
    return found


def _signature(labeler: type[Labeler]) -> dict[str, inspect.Parameter]:
    try:
        signature = inspect.signature(labeler, eval_str=True)
    except NameError:  # A name that is imported for type checkers alone.
        signature = inspect.signature(labeler)
    return {
        name: parameter
        for name, parameter in signature.parameters.items()
        if name != "device" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


def parameters(labeler: type[Labeler], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all parameters of a labeler: the given ones, and its constructor's defaults for the rest.

    They are part of the fingerprint, so they must be plain JSON values; `device` is not one of them. Raises ConfigError
    if a parameter is unknown or missing.
    """
    known = _signature(labeler)
    for name in given:
        if name not in known:
            raise ConfigError(f"labeler {labeler.spec.name!r} has no parameter {name!r}; {nearest(name, known)}")
    merged = {name: given.get(name, parameter.default) for name, parameter in known.items()}
    missing = [name for name, value in merged.items() if value is inspect.Parameter.empty]
    if missing:
        raise ConfigError(f"labeler {labeler.spec.name!r} needs the parameter {missing[0]!r}")
    return merged


def build(labeler: type[Labeler], given: Mapping[str, Any], device: str = "cpu") -> Labeler:
    """Loads a labeler; `device` is passed if its constructor takes one."""
    options = parameters(labeler, given)
    if "device" in inspect.signature(labeler).parameters:
        options["device"] = device
    return labeler(**options)


def check_label(modality: Modality, value: Any, *, any_size: bool = False) -> None:
    """Raises LabelError if a label is not what its modality says: type, shape, dtype, fields, finite numbers.

    With `any_size` the axes h and w may have any length (a label of a whole photograph).
    """
    if modality.kind == "text":
        if not isinstance(value, str):
            raise LabelError(f"{modality.name}: the label is a {type(value).__name__}, expected a str")
        return
    if modality.kind == "structured":
        records = value if modality.many else [value]
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            expected = "a list of dicts" if modality.many else "a dict"
            raise LabelError(f"{modality.name}: the label is a {type(value).__name__}, expected {expected}")
        for record in records:
            if set(record) != set(modality.fields):
                raise LabelError(
                    f"{modality.name}: the fields are {sorted(record)}, expected {sorted(modality.fields)}"
                )
        return
    _check_array(modality, value, any_size)


def _check_array(modality: Modality, value: Any, any_size: bool) -> None:
    import numpy as np

    if type(value).__module__ == "torch":
        value = value.cpu().numpy()
    if not isinstance(value, np.ndarray):
        raise LabelError(f"{modality.name}: the label is a {type(value).__name__}, expected a {modality.dtype} array")
    expected = modality.shape()
    free = [any_size and axis in "hw" for axis in modality.axes.split()]
    fits = len(value.shape) == len(expected) and all(
        is_free or have == want for is_free, have, want in zip(free, value.shape, expected, strict=True)
    )
    if not fits or value.dtype != modality.dtype:
        raise LabelError(
            f"{modality.name}: the label is {value.dtype} {value.shape}, expected {modality.dtype} "
            f"({modality.axes}) = {expected}"
        )
    if value.dtype.kind == "f" and modality.null == modality.null and not np.isfinite(value).all():
        raise LabelError(
            f"{modality.name}: the label holds {int((~np.isfinite(value)).sum())} values that are NaN or infinite"
        )
