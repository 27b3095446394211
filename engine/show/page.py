"""Writes a report: one HTML page from the template `report.html`, and the pictures beside it."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
from PIL import Image

from manifests.store.storage import replace_file

_PICTURES = "pictures"
_LONGEST_CELL = 300
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# The frame of a chart in its own units: where the plot begins and how large it is. The template draws around it.
_LEFT, _TOP, _WIDTH, _HEIGHT = 42, 6, 278, 104


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Holds a small chart with a heading and lines of text above it; all points are in the units of the drawing.

    `area` and `line` are points that become a filled and an open line, `dots` stand apart, `even` is the y of a dashed
    level. `most` and `last` are the ends of the axes in words; both axes begin at 0.
    """

    heading: str
    words: Sequence[str]
    most: str
    last: str
    area: Sequence[tuple[float, float]] = ()
    line: Sequence[tuple[float, float]] = ()
    dots: Sequence[tuple[float, float]] = ()
    even: float | None = None


@dataclass(frozen=True, kw_only=True)
class PageBlock:
    """Holds a piece of a section, shown in this order: a heading, a paragraph, a command, a picture, a table, charts."""

    heading: str = ""
    words: str = ""
    command: str = ""
    picture: str = ""
    table: pa.Table | None = None
    charts: Sequence[Chart] = ()


@dataclass(frozen=True, kw_only=True)
class PageSection:
    """Holds a section that can be linked to: its heading, the paragraph below it, and its blocks."""

    anchor: str
    heading: str
    words: str
    blocks: Sequence[PageBlock] = ()


class Page:
    """Writes one page, `out/report.html`, with its pictures in `out/pictures/`."""

    def __init__(self, out: Path) -> None:
        self._out = out
        (out / _PICTURES).mkdir(parents=True, exist_ok=True)

    def picture(self, stem: str, pixels: np.ndarray) -> str:
        """Writes uint8 (h, w, 3) as a PNG and returns its path as the page has it."""
        path = f"{_PICTURES}/{_plain(stem)}.png"
        Image.fromarray(pixels).save(self._out / path)
        return path

    def write(self, **shown: Any) -> Path:
        """Fills the template and writes the page whole, in place of the one before. Returns its path."""
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            finalize=_storable,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["cell"] = cell
        environment.globals["is_number"] = _is_number
        path = self._out / "report.html"
        html = environment.get_template("report.html").render(**shown).lstrip() + "\n"
        replace_file(path, html.encode())
        return path


def use_chart(heading: str, words: Sequence[str], counts: np.ndarray) -> Chart:
    """Charts counts (n,) from the largest down as an area; the y axis is log(1 + count), the dashed line their mean."""
    ordered = np.sort(counts)[::-1]
    places = np.unique(np.linspace(0, len(ordered) - 1, 300).round().astype(int))
    area = list(zip((places + 1).tolist(), ordered[places].tolist(), strict=True))
    return chart(heading, words, area=area, level=float(counts.mean()), scale=math.log1p)


def chart(
    heading: str,
    words: Sequence[str],
    *,
    area: Sequence[tuple[float, float]] = (),
    line: Sequence[tuple[float, float]] = (),
    dots: Sequence[tuple[float, float]] = (),
    level: float | None = None,
    scale: Callable[[float], float] = float,
) -> Chart:
    """Charts points (x, y) as an area, a line and dots, over a dashed level; `scale` is applied to the y axis."""
    points = [*area, *line, *dots]
    last = max((x for x, _ in points), default=1) or 1
    most = max([y for _, y in points] + [level or 0]) or 1

    def at(x: float, y: float) -> tuple[float, float]:
        height = scale(y) / scale(most)
        return round(_LEFT + x / last * _WIDTH, 1), round(_TOP + (1 - height) * _HEIGHT, 1)

    return Chart(
        heading=heading,
        words=words,
        most=cell(most),
        last=cell(last),
        area=[at(0, 0), *(at(x, y) for x, y in area), at(last, 0)] if area else (),
        line=[at(x, y) for x, y in line],
        dots=[at(x, y) for x, y in dots],
        even=None if level is None else at(0, level)[1],
    )


def cell(value: Any, longest: int = _LONGEST_CELL) -> str:
    """Returns a value as people read it, cut to `longest` characters."""
    if value is None:
        return ""
    if isinstance(value, float):
        text = f"{value:,.4g}" if abs(value) < 1e6 else f"{value:,.0f}"
    elif isinstance(value, int) and not isinstance(value, bool):
        text = f"{value:,}"
    else:
        text = str(value)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def many(count: int, one: str, more: str = "") -> str:
    """Returns a count with its noun: "1 shard", "1,200 shards"."""
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def _plain(name: str) -> str:
    """Returns a name as a part of a file name."""
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "@-_") else "-" for letter in name)


def _storable(value: Any) -> Any:
    """Drops from text what no HTML file can hold: lone surrogates and control characters."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return _CONTROLS.sub("\ufffd", value).encode("utf-8", "replace").decode("utf-8")
