"""An HTML page as it grows: elements, tables, charts, and the pictures beside it.

The page is a tree of elements, so that every text that comes from data (captions, file names, messages) is escaped
where the tree is written, and nowhere else.
"""

import os
import unicodedata
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
from PIL import Image

Element = ElementTree.Element

_PICTURES = "pictures"
_LONGEST_CELL = 300


class Page:
    """One page, `out/report.html`, with its pictures in `out/pictures/`."""

    def __init__(self, title: str, out: Path) -> None:
        self._out = out
        (out / _PICTURES).mkdir(parents=True, exist_ok=True)
        self._root = ElementTree.Element("html", lang="en")
        head = self.add(self._root, "head")
        self.add(head, "meta", charset="utf-8")
        self.add(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
        self.add(head, "title", title)
        self.add(head, "style", resources.files("engine.show").joinpath("report.css").read_text(encoding="utf-8"))
        self.body = self.add(self._root, "body")
        self.add(self.body, "h1", title)

    def add(self, parent: Element, tag: str, text: str = "", **attributes: str) -> Element:
        """A new element; `class_` stands for the attribute `class`, `text_anchor` for `text-anchor`."""
        named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        element = ElementTree.SubElement(parent, tag, {name: _storable(value) for name, value in named.items()})
        element.text = _storable(text)
        return element

    def section(self, anchor: str, heading: str, words: str) -> Element:
        """A heading that can be linked to, and the paragraph below it."""
        self.add(self.body, "h2", heading, id=anchor)
        return self.add(self.body, "p", words, class_="faint")

    def picture(self, stem: str, pixels: np.ndarray) -> str:
        """Writes uint8 (h, w, 3) as a PNG; its path as the page has it."""
        path = f"{_PICTURES}/{_plain(stem)}.png"
        Image.fromarray(pixels).save(self._out / path)
        return path

    def table(self, table: pa.Table) -> None:
        """An Arrow table; numbers stand right."""
        if not table.num_rows:
            self.add(self.body, "p", "No rows.", class_="faint")
            return
        element = self.add(self.add(self.body, "div", class_="scroll"), "table")
        kinds = ["number" if _is_number(item.type) else "text" for item in table.schema]
        head = self.add(element, "tr")
        for name, kind in zip(table.column_names, kinds, strict=True):
            self.add(head, "th", name, class_=kind)
        for row in table.to_pylist():
            line = self.add(element, "tr")
            for value, kind in zip(row.values(), kinds, strict=True):
                self.add(line, "td", cell(value), class_=kind)

    def chart(self, parent: Element, counts: np.ndarray) -> None:
        """Counts (n,) from the largest down as an area; the y axis is log(1 + count), the dashed line their mean."""
        width, height, left, top, below = 320, 104, 42, 6, 16
        ordered = np.sort(counts)[::-1]
        places = np.unique(np.linspace(0, len(ordered) - 1, 300).round().astype(int))
        most = np.log1p(max(1, int(ordered[0])))
        xs = left + places / max(1, len(ordered) - 1) * (width - left)
        ys, even = (top + height * (1 - np.log1p(values) / most) for values in (ordered[places], counts.mean()))
        base = top + height
        line = " ".join(f"L{x:.1f} {y:.1f}" for x, y in zip(xs, ys, strict=True))
        svg = self.add(parent, "svg", viewBox=f"0 0 {width} {base + below}", role="img")
        self.add(svg, "path", d=f"M{left} {base} {line} L{width} {base} Z", class_="area")
        self.add(svg, "path", d=f"M{left} {base} H{width}", class_="axis")
        self.add(svg, "path", d=f"M{left} {even:.1f} H{width}", class_="even")
        self.add(svg, "text", f"{int(ordered[0]):,}", x=str(left - 4), y=str(top + 7), text_anchor="end")
        self.add(svg, "text", "0", x=str(left - 4), y=str(base), text_anchor="end")
        self.add(svg, "text", f"{len(ordered):,}", x=str(width), y=str(base + 12), text_anchor="end")

    def curve(
        self,
        parent: Element,
        line: Sequence[tuple[float, float]],
        dots: Sequence[tuple[float, float]],
        level: float | None,
    ) -> None:
        """Points (x, y) as a line and as dots, over a dashed level; x and y begin at 0."""
        width, height, left, top, below = 320, 104, 42, 6, 16
        points = [*line, *dots]
        last = max((x for x, _ in points), default=1.0) or 1.0
        most = max([y for _, y in points] + [level or 0.0]) or 1.0
        base = top + height

        def at(x: float, y: float) -> tuple[str, str]:
            return f"{left + x / last * (width - left):.1f}", f"{base - y / most * height:.1f}"

        svg = self.add(parent, "svg", viewBox=f"0 0 {width} {base + below}", role="img")
        self.add(svg, "path", d=f"M{left} {base} H{width}", class_="axis")
        if level is not None:
            self.add(svg, "path", d=f"M{left} {at(0, level)[1]} H{width}", class_="even")
        if line:
            self.add(svg, "polyline", points=" ".join(",".join(at(x, y)) for x, y in line), class_="line")
        for x, y in dots:
            cx, cy = at(x, y)
            self.add(svg, "circle", cx=cx, cy=cy, r="2.5", class_="dot")
        self.add(svg, "text", f"{most:.1f}", x=str(left - 4), y=str(top + 7), text_anchor="end")
        self.add(svg, "text", "0", x=str(left - 4), y=str(base), text_anchor="end")
        self.add(svg, "text", f"{last:,.0f}", x=str(width), y=str(base + 12), text_anchor="end")

    def write(self) -> Path:
        """Writes the page whole, in place of the one before; its path."""
        path = self._out / "report.html"
        text = "<!doctype html>\n" + ElementTree.tostring(self._root, encoding="unicode", method="html") + "\n"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
        return path


def cell(value: Any, longest: int = _LONGEST_CELL) -> str:
    """A value as people read it."""
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
    """A count with its noun: "1 shard", "1,200 shards"."""
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def _plain(name: str) -> str:
    """A name as a part of a file name."""
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "@-_") else "-" for letter in name)


def _storable(text: str) -> str:
    """Text without what no HTML file can hold: lone surrogates and control characters."""
    kept = "".join(
        "\ufffd" if unicodedata.category(letter) == "Cc" and letter not in "\n\t" else letter for letter in text
    )
    return kept.encode("utf-8", "replace").decode("utf-8")
