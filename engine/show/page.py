"""Writes a report: one HTML page from the template `report.html`, and the pictures beside it."""

import unicodedata
from collections.abc import Sequence
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
    most = np.log1p(max(1, int(ordered[0])))
    points = [
        _at(x, y) for x, y in zip(places / max(1, len(ordered) - 1), np.log1p(ordered[places]) / most, strict=True)
    ]
    return Chart(
        heading=heading,
        words=words,
        most=f"{int(ordered[0]):,}",
        last=f"{len(ordered):,}",
        area=[_at(0, 0), *points, _at(1, 0)],
        even=_at(0, np.log1p(counts.mean()) / most)[1],
    )


def curve_chart(
    heading: str,
    words: Sequence[str],
    line: Sequence[tuple[float, float]],
    dots: Sequence[tuple[float, float]],
    level: float | None,
) -> Chart:
    """Charts points (x, y) as a line and as dots, over a dashed level."""
    points = [*line, *dots]
    last = max((x for x, _ in points), default=1.0) or 1.0
    most = max([y for _, y in points] + [level or 0.0]) or 1.0
    return Chart(
        heading=heading,
        words=words,
        most=f"{most:.1f}",
        last=f"{last:,.0f}",
        line=[_at(x / last, y / most) for x, y in line],
        dots=[_at(x / last, y / most) for x, y in dots],
        even=None if level is None else _at(0, level / most)[1],
    )


def _at(x: float, y: float) -> tuple[float, float]:
    """Returns the place of a point, both from 0 to 1, in the drawing."""
    return round(float(_LEFT + x * _WIDTH), 1), round(float(_TOP + (1 - y) * _HEIGHT), 1)


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
    kept = "".join(
        "\ufffd" if unicodedata.category(letter) == "Cc" and letter not in "\n\t" else letter for letter in value
    )
    return kept.encode("utf-8", "replace").decode("utf-8")
