"""Draws what was given and what was generated: as tiles, and as a sheet with a line for each sample.

All pictures are uint8 (h, w, 3), sRGB.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from engine.show import pictures
from engine.show.contact import modality_of

_INK, _FAINT, _PAPER, _RULE, _WARNING = (24, 26, 30), (110, 114, 122), (255, 255, 255), (222, 225, 230), (176, 42, 32)
_GAP, _TOP, _HEAD = 10, 92, 26
_LETTERS = 31
RANDOM_WEIGHTS = "random weights: not trained"


@dataclass(frozen=True, kw_only=True)
class SheetLine:
    """Holds a line of the sheet: labels by modality, as tokenizers take and give them, from left to right."""

    given: Mapping[str, Any]
    generated: Mapping[str, Any]
    title: str = ""


def tile(name: str, labels: Mapping[str, Any]) -> np.ndarray | str:
    """Returns `labels[name]` as a picture or as text. Boxes are drawn over the `rgb` among the labels."""
    label, facts = labels[name], modality_of(name)
    if isinstance(label, np.ndarray):
        if label.ndim not in (2, 3):
            return f"an array of {' x '.join(map(str, label.shape))} numbers"
        return pictures.picture(facts, label)
    base = name.partition("@")[0]
    if base == "palette":
        return pictures.swatches(label) if label else "no palette: the tokens made are not one"
    if facts is not None and facts.crop_rule == "boxes":
        pixels = [other for at, other in labels.items() if at.partition("@")[0] == "rgb"]
        ground = pictures.fit(pixels[0]) if pixels else pictures.blank()
        return pictures.with_boxes(ground, label) if label else "no boxes"
    if isinstance(label, Mapping):
        known = {field: value for field, value in label.items() if value is not None}
        return "\n".join(f"{field.replace('_', ' ')}  {value:.4g}" for field, value in known.items()) or "no fields"
    return str(label) or "no words"


def marked(picture: np.ndarray, words: str = RANDOM_WEIGHTS) -> np.ndarray:
    """Returns the picture with words across its lower edge."""
    height, width = picture.shape[:2]
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    size = max(6, min(16, height // 8))
    font = ImageFont.load_default(size)
    while size > 6 and draw.textlength(words, font=font) > width:
        size -= 1
        font = ImageFont.load_default(size)
    draw.rectangle((0, height - size - 5, width, height), fill=_WARNING)
    draw.text((2, height - size - 4), words, font=font, fill=_PAPER)
    return np.array(image)


def sheet(rows: Sequence[SheetLine], *, title: str, note: str = "", random_weights: bool = False) -> np.ndarray:
    """Draws a line for each sample: what was given at the left, what was generated at the right, each under its name.

    With `random_weights` every generated tile and the sheet itself say that the model was never trained.
    """
    given = list(dict.fromkeys(name for row in rows for name in row.given))
    generated = list(dict.fromkeys(name for row in rows for name in row.generated))
    step = pictures.TILE + _GAP
    # A wider gap between what is given and what is generated.
    shift = 3 * _GAP if given and generated else 0
    width = max(2 * _GAP + (len(given) + len(generated)) * step + shift, 560)
    line = _HEAD + pictures.TILE + _GAP
    image = Image.new("RGB", (width, _TOP + len(rows) * line + _GAP), _PAPER)
    draw = ImageDraw.Draw(image)
    heading, body = ImageFont.load_default(20), ImageFont.load_default(14)
    letters = width // 8
    draw.text((_GAP, 10), textwrap.shorten(title, letters * 3 // 4), font=heading, fill=_INK)
    draw.text((_GAP, 38), textwrap.shorten(note, letters), font=body, fill=_FAINT)
    if random_weights:
        draw.text((width - 240, 38), RANDOM_WEIGHTS, font=body, fill=_WARNING)
    right = _GAP + len(given) * step + shift
    for x, word in ((_GAP, "given"), (right, "generated")):
        if given or word == "generated":
            draw.text((x, 66), word, font=heading, fill=_FAINT)
    if shift:
        x = right - 2 * _GAP
        draw.line((x, 66, x, image.height - _GAP), fill=_RULE, width=2)
    for number, row in enumerate(rows):
        labels = {**row.given, **row.generated}
        y = _TOP + number * line
        for names, left in ((given, _GAP), (generated, right)):
            for place, name in enumerate(names):
                at = (left + place * step, y)
                words = f"{name}  {row.title}" if place == 0 and left == right else name
                draw.text((at[0], y + 6), textwrap.shorten(words, _LETTERS), font=body, fill=_INK)
                if name in labels:
                    shown = tile(name, labels)
                    if random_weights and name in row.generated and isinstance(shown, np.ndarray):
                        shown = marked(pictures.fit(shown))
                    elif random_weights and name in row.generated:
                        draw.text((at[0], y + _HEAD + pictures.TILE - 16), RANDOM_WEIGHTS, font=body, fill=_WARNING)
                    pictures.put(image, shown, at[0], y + _HEAD)
    return np.array(image)
