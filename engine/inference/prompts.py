"""Reads what `modmill generate --from` is given (text, colors, files) as tokens of a model's modalities."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from labelers.files import Files
from manifests.errors import ConfigError, DecodeError, LabelError, nearest
from manifests.formats import codecs
from manifests.modality import Modality, get
from manifests.pixels import crops
from manifests.pixels.raw_labels import fit_array
from tokenize_jobs.sequences.words import PALETTE_MOST
from train.generation.generator import Tokenizers


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Holds what is given of one modality.

    text    what was typed: the text itself, or the path of a file
    label   what the model is told, cropped to the center square; None if tokens were given
    tokens  the label by the model's tokenizer
    """

    modality: str
    text: str
    label: Any
    tokens: np.ndarray


def read(arguments: Sequence[str], tokenizers: Tokenizers) -> dict[str, Prompt]:
    """Returns the prompts of arguments MODALITY=VALUE, by modality. What VALUE is depends on the modality:

    caption, text   the text itself
    rgb             a photograph of any kind that `manifests/pixels/images.py` decodes
    other maps      a PNG, TIFF or .npy of numbers, as the labeler `files` reads them
    boxes           a JSON list of {"class", "x0", "y0", "x1", "y1"}, a file or typed: fractions of the square picture
    palette         colors "#ff0000,#00cc88", or a JSON list of such or of [r, g, b], a file or typed
    metadata        "brightness=120,colorfulness=40", or a JSON object, a file or typed
    all             a .npy of integers with one axis: the tokens themselves

    Pictures are cut to the center square, as crop 0 of a corpus is. Raises ConfigError for a file that is missing, cannot
    be read or does not fit, for a modality that the model does not know, and for one that is given twice.
    """
    prompts: dict[str, Prompt] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not value.strip():
            raise ConfigError(
                f"--from {argument}: expected MODALITY=VALUE, such as rgb=photo.jpg or caption='a red cube'"
            )
        tokenizers.vocabulary.index(name)
        if name in prompts:
            raise ConfigError(f"--from {argument}: {name} is given twice; give one of each modality")
        prompts[name] = _prompt(name, value, tokenizers)
    return prompts


def _prompt(name: str, value: str, tokenizers: Tokenizers) -> Prompt:
    if value.endswith(".npy"):
        array = _decoded(value, codecs.NPY.decode)
        if array.ndim == 1:
            return Prompt(modality=name, text=value, label=None, tokens=array)
    facts = get(name)
    if facts.kind == "text":
        label: Any = value
    elif facts.kind == "structured":
        label = _record(facts, value)
    else:
        label = _map(facts, value)
    return Prompt(modality=name, text=value, label=label, tokens=tokenizers.encode(name, label))


def _decoded(path: str, decode: Any) -> Any:
    """Decodes the bytes of a file. Raises ConfigError if that fails."""
    try:
        return decode(Path(os.path.expanduser(path)).read_bytes())
    except (DecodeError, LabelError) as error:
        raise ConfigError(f"{path}: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); expected a file") from error


def _map(facts: Modality, path: str) -> np.ndarray:
    """Returns the center square of a photograph or a map, at the modality's size."""

    def decode(data: bytes) -> np.ndarray:
        numbers = codecs.decode_file(facts, data)
        is_color = numbers.ndim == 3 and numbers.shape[2] in (3, 4) and "c" not in facts.axes.split()
        if is_color and (numbers[..., :3] == numbers[..., :1]).all():
            # Gray that a program saved as color.
            numbers = numbers[..., 0]
        if facts.base_name == "edges" and numbers.size and numbers.max() == 1:
            # Drawn with one bit per pixel.
            numbers = numbers * np.uint8(255)
        if facts.base_name == "depth":
            # Tokens keep neither scale nor offset, so generated depth may be below 0.
            known = numbers[np.isfinite(numbers)]
            numbers = numbers - min(0, known.min(initial=0))
        label = fit_array(facts, numbers)
        axes = facts.axes.split()
        width, height = label.shape[axes.index("w")], label.shape[axes.index("h")]
        centre = crops.plan_crop(crops.CropRule(), "", 0, width, height)
        return crops.crop_label(facts, label, centre, facts.size // facts.stride)

    if "h" not in facts.axes.split():
        raise ConfigError(f"--from {facts.name}={path}: expected a .npy of its tokens")
    return _decoded(path, decode)


def _record(facts: Modality, value: str) -> Any:
    """Returns boxes, a palette or metadata, given as JSON (typed or in a file) or in the short form."""
    typed = value.lstrip()[:1] in ("[", "{")
    if not typed and not value.endswith(".json"):
        if facts.base_name == "palette":
            return _palette(value.split(","))
        if facts.base_name == "metadata":
            return _metadata(facts, dict(_pair(facts, word) for word in value.split(",")))
        raise ConfigError(f"--from {facts.name}={value}: expected a .json file, or JSON")
    where = "what was typed" if typed else value
    try:
        found = json.loads(value) if typed else _decoded(value, json.loads)
    except ValueError as error:
        raise ConfigError(f"{facts.name}: {where} is no JSON ({error})") from error
    try:
        if facts.crop_rule == "boxes":
            labeler = Files(facts.name, column="boxes")
            return labeler.label({"source": ["--from"], "columns": [{"boxes": found}]})[facts.name][0]
        return _palette(found) if facts.base_name == "palette" else _metadata(facts, found)
    except (LabelError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise ConfigError(f"--from {facts.name}: {where} does not fit: {error}") from error


def _pair(facts: Modality, word: str) -> tuple[str, float]:
    name, _, number = word.partition("=")
    try:
        return name.strip(), float(number)
    except ValueError as error:
        raise ConfigError(f"{facts.name}: {word!r}; expected FIELD=NUMBER, such as brightness=120") from error


def _palette(colors: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns the records of a palette; `colors` are "#rrggbb", [r, g, b] or {"r", "g", "b"}, the most important first."""
    values = [_color(color) for color in colors]
    if not 1 <= len(values) <= PALETTE_MOST:
        raise ConfigError(
            f"palette of {len(values)} colors; expected 1 to {PALETTE_MOST} (a model that has learned little may have written "
            "none: leave it out then)"
        )
    return [
        {"k": len(values), "rank": rank, "r": red, "g": green, "b": blue, "share": None}
        for rank, (red, green, blue) in enumerate(values)
    ]


def _color(color: Any) -> tuple[int, ...]:
    try:
        if isinstance(color, str):
            digits = color.strip().removeprefix("#")
            found = tuple(bytes.fromhex(digits))
        elif isinstance(color, Mapping):
            found = tuple(int(color[channel]) for channel in "rgb")
        else:
            found = tuple(int(number) for number in color)
    except (ValueError, TypeError, KeyError):
        found = ()
    if len(found) != 3 or not all(0 <= number <= 255 for number in found):
        raise ConfigError(f"palette: {color!r} is no color; expected #rrggbb, or r, g and b from 0 to 255")
    return found


def _metadata(facts: Modality, found: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in found.items():
        if name not in facts.fields:
            raise ConfigError(f"metadata has no field {name!r}; {nearest(name, facts.fields)}")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConfigError(f"metadata: {name} is {value!r}; expected a number")
    return dict(found)
