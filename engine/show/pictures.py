"""Paints labels as pictures: each kind of modality, boxes and masks over pixels, and the contact sheet.

All pictures are uint8 (h, w, 3), sRGB.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from manifests.modality import Modality
from manifests.pixels.crops import rle_decode

TILE = 224  # side of a picture on the contact sheet, px
# Class and instance colors by number. The first two are quiet: they are mostly what lies behind (sky, ground).
CATEGORIES: tuple[tuple[int, int, int], ...] = (
    (168, 198, 226),
    (188, 178, 164),
    (228, 87, 86),
    (54, 118, 190),
    (242, 166, 38),
    (84, 162, 75),
    (150, 96, 180),
    (57, 178, 178),
    (238, 130, 170),
    (150, 108, 74),
    (120, 130, 40),
    (70, 80, 120),
)
_NULL = (58, 60, 66)  # "no value here"
_INK, _FAINT, _PAPER, _RULE = (24, 26, 30), (110, 114, 122), (255, 255, 255), (222, 225, 230)
_LINES = 11  # of text in a cell: a line is left for a warning
_FEW = 4
_SHOWN = (1, 92)  # percentiles at the ends of the scale: a floor's far end would leave no colors for what is near


def picture(modality: Modality | None, label: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
    """Draws an array of a modality, (h, w) or (h, w, c) of any numbers, as a picture of its own height and width.

    uint8 with three channels are shown as they are, normals by their direction, class maps in fixed colors, single
    channels of other numbers in viridis, small ones bright, all else stretched to its own range; pixels without a value
    in dark gray. `modality` is None if nothing is known of it. `like` is the label that `label` was decoded from:
    tokens know no null, so that what they decode to means nothing at pixels where the label has no value.
    """
    array = np.asarray(label)
    known = _known(modality, array)
    if like is not None and like.shape == array.shape:
        known &= _known(modality, like)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim == 2:
        shown = _one_channel(modality, array, known)
    elif array.ndim != 3:
        raise ValueError(f"an array of shape {array.shape} is no picture; expected (h, w) or (h, w, c)")
    elif array.dtype == np.uint8 and array.shape[2] == 3:
        shown = array.copy()
    else:
        shown = _channels(modality, array, known)
    shown[~known] = _NULL
    return shown


def _known(modality: Modality | None, array: np.ndarray) -> np.ndarray:
    """Tells which pixels have a value: bool (h, w)."""
    pixels = array[..., None] if array.ndim == 2 else array
    known: np.ndarray = np.isfinite(pixels)
    if modality is not None and modality.null is not None:
        known = known & (pixels != modality.null)
    # A pixel is null if all of its channels are.
    return known.max(axis=-1)


def _one_channel(modality: Modality | None, values: np.ndarray, known: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8:
        is_classes = modality is not None and modality.unit == "class index"
        return class_colors(values) if is_classes else np.repeat(values[..., None], 3, axis=2)
    # Percentiles, so that the scale is the same for values times a factor plus a shift: tokens of depth hold no more.
    low, high = np.percentile(values[known], _SHOWN) if known.any() else (0.0, 1.0)
    share = (np.where(known, values, low) - low) / (high - low if high > low else 1.0)
    return cv2.cvtColor(cv2.applyColorMap(_bytes(1 - share), cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)


def _channels(modality: Modality | None, values: np.ndarray, known: np.ndarray) -> np.ndarray:
    channels = np.zeros((*values.shape[:2], 3))
    channels[..., : min(3, values.shape[2])] = np.nan_to_num(values[..., :3].astype(np.float64))
    if modality is not None and modality.crop_rule == "normals":
        # As pictures of normals are usually drawn: x right, y up, z towards the camera, which is blue.
        return _bytes((channels * (1, -1, -1) + 1) / 2)
    low, high = (channels[known].min(), channels[known].max()) if known.any() else (0.0, 1.0)
    return _bytes((channels - low) / (high - low if high > low else 1.0))


def class_colors(classes: np.ndarray) -> np.ndarray:
    """Draws a uint8 (h, w) map of class numbers in fixed colors."""
    return np.array([CATEGORIES[number % len(CATEGORIES)] for number in range(256)], np.uint8)[classes]


def with_boxes(base: np.ndarray, boxes: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Paints boxes in fractions of the picture, with their classes, over it; colors by place, as masks have them."""
    image = Image.fromarray(base)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(max(10, base.shape[0] // 14))
    height, width = base.shape[:2]
    ordered = in_order(boxes)
    # A segmenter without classes calls all its many boxes the same.
    named = len({box["class"] for box in boxes}) > 1 or len(boxes) <= _FEW
    for number, box in enumerate(ordered):
        left, right = sorted(round(box[name] * (width - 1)) for name in ("x0", "x1"))
        top, bottom = sorted(round(box[name] * (height - 1)) for name in ("y0", "y1"))
        draw.rectangle((left, top, right, bottom), outline=color_of(number), width=2)
    for number, box in enumerate(ordered if named else ()):
        x, y = round(box["x0"] * (width - 1)), round(box["y0"] * (height - 1))
        _, _, text_width, text_height = draw.textbbox((0, 0), box["class"], font=font)
        x, y = max(0, min(x, width - int(text_width) - 6)), max(0, y - int(text_height) - 3)
        draw.rectangle((x, y, x + text_width + 5, y + text_height + 3), fill=color_of(number))
        draw.text((x + 3, y), box["class"], font=font, fill=_INK)
    return np.array(image)


def with_masks(base: np.ndarray, instances: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Paints instances (run lengths at any resolution that shows the whole picture) as colored masks over a paled picture."""
    height, width = base.shape[:2]
    gray = cv2.cvtColor(cv2.cvtColor(base, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    shown = (0.4 * gray + 0.6 * 245).astype(np.uint8)
    # Small ones last, so that large ones do not hide them.
    numbered = sorted(enumerate(in_order(instances)), key=lambda entry: -_area(entry[1]))
    for number, instance in numbered:
        mask = rle_decode(instance["rle_counts"], instance["rle_height"], instance["rle_width"]).astype(np.uint8)
        mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
        color = np.array(color_of(number))
        shown[mask > 0] = (0.4 * gray + 0.6 * color)[mask > 0].astype(np.uint8)
        contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(shown, contours, -1, (0.6 * color).astype(int).tolist(), 1)
    return shown


def swatches(colors: Sequence[Mapping[str, Any]], side: int = TILE) -> np.ndarray:
    """Draws a palette (records with `r g b` and `share`, None or 0 if unknown) as stripes, as wide as their share."""
    shares = np.array([color.get("share") or 0.0 for color in colors], dtype=float)
    if not shares.sum() > 0:
        shares = np.ones(len(colors))
    ends = np.rint(np.cumsum(shares) / shares.sum() * side).astype(int)
    picture = np.full((side, side, 3), 255, np.uint8)
    for color, start, end in zip(colors, (0, *ends), ends, strict=False):
        picture[:, start:end] = (color["r"], color["g"], color["b"])
    return picture


def in_order(boxes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Sorts boxes from the top left corner on, so that a box has the same color after it went through tokens."""
    return sorted(boxes, key=lambda box: (box["x0"] ** 2 + box["y0"] ** 2, box["x1"] ** 2 + box["y1"] ** 2))


def color_of(number: int) -> tuple[int, int, int]:
    """Returns the color of the instance with this number."""
    bright = CATEGORIES[2:]
    return bright[number % len(bright)]


def blank(side: int = TILE) -> np.ndarray:
    """Returns what boxes are drawn on if no pixels are known."""
    return np.full((side, side, 3), 236, np.uint8)


def fit(picture: np.ndarray, side: int = TILE) -> np.ndarray:
    """Returns a copy that fits into a square; small pictures are enlarged without smoothing."""
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    if scale == 1:
        return picture
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)


@dataclass(frozen=True, kw_only=True)
class SheetRow:
    """Holds a sample on the contact sheet: its title, and for each column a picture, a text or nothing, two lines of them."""

    title: str
    note: str
    labels: Mapping[str, np.ndarray | str | None]
    decoded: Mapping[str, np.ndarray | str | None]


def sheet(rows: Sequence[SheetRow], columns: Sequence[str]) -> Image.Image:
    """Draws a contact sheet: a column a modality, and for each sample a line of labels above a line of what tokens hold.

    Where no tokens are shown there is no line for them.
    """
    gap, left, top, title = 10, 86, 46, 34
    has_tokens = any(cell is not None for row in rows for cell in row.decoded.values())
    block = title + (1 + has_tokens) * (TILE + gap)
    width = left + len(columns) * (TILE + gap) + gap
    image = Image.new("RGB", (width, top + len(rows) * block + gap), _PAPER)
    draw = ImageDraw.Draw(image)
    heading, body = ImageFont.load_default(20), ImageFont.load_default(14)
    for place, name in enumerate(columns):
        draw.text((left + place * (TILE + gap), 14), name, font=heading, fill=_INK)
    for number, row in enumerate(rows):
        y = top + number * block
        draw.line((gap, y, width - gap, y), fill=_RULE)
        draw.text((left, y + 9), _one_line(draw, row.title, body, width // 2), font=body, fill=_INK)
        shift = draw.textlength(_one_line(draw, row.title, body, width // 2), font=body)
        draw.text((left + shift + 12, y + 9), row.note, font=body, fill=_FAINT)
        for line, (name, cells) in enumerate((("label", row.labels), ("from\ntokens", row.decoded))[: 1 + has_tokens]):
            cell_y = y + title + line * (TILE + gap)
            draw.multiline_text((gap + 4, cell_y + TILE // 2 - 12), name, font=body, fill=_FAINT)
            for place, column in enumerate(columns):
                put(image, cells.get(column), left + place * (TILE + gap), cell_y)
    return image


def put(image: Image.Image, cell: np.ndarray | str | None, x: int, y: int) -> None:
    """Paints a cell of a sheet, TILE px wide and high: a picture, some lines of text, or a dash for None."""
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    if isinstance(cell, np.ndarray):
        tile = fit(cell)
        left, top = x + (TILE - tile.shape[1]) // 2, y + (TILE - tile.shape[0]) // 2
        image.paste(Image.fromarray(tile), (left, top))
        # A map of edges is mostly of one color, perhaps the paper's: a frame shows where it ends.
        draw.rectangle((left, top, left + tile.shape[1] - 1, top + tile.shape[0] - 1), outline=_RULE)
    elif isinstance(cell, str):
        draw.multiline_text((x, y), _wrapped(draw, cell, font), font=font, fill=_INK, spacing=4)
    else:
        draw.text((x + TILE // 2 - 5, y + TILE // 2 - 9), "-", font=font, fill=_FAINT)


def _wrapped(draw: ImageDraw.ImageDraw, text: str, font: Any) -> str:
    """Breaks text into the lines of a cell; of a word too long for a line only its beginning stands."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            grown = f"{line} {word}".strip()
            if draw.textlength(grown, font=font) <= TILE:
                line = grown
                continue
            if line:
                lines.append(line)
            line = _one_line(draw, word, font, TILE)
        lines.append(line)
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], lines[_LINES - 1] + " ..."]
    return "\n".join(lines)


def _one_line(draw: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    text = " ".join(text.split())[:400]
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."


def _area(box: Mapping[str, Any]) -> float:
    return (box["x1"] - box["x0"]) * (box["y1"] - box["y0"])


def _bytes(share: np.ndarray) -> np.ndarray:
    return np.rint(share.clip(0, 1) * 255).astype(np.uint8)
