"""The contact sheet of a corpus: a sample a row with all its modalities, on the page and as one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.show import contact, pictures
from engine.show.page import Element, Page, cell, many


def add_contact_sheet(
    page: Page, corpus: Mapping[str, Any], shown: Sequence[contact.Sample], class_names: Sequence[str]
) -> None:
    """A corpus's samples, all modalities side by side, and the same as one picture."""
    name = corpus["corpus"]
    if not shown:
        page.section(f"corpus-{name}", name, "Nothing was made of its samples yet.")
        return
    held_out = sum(sample.is_held_out for sample in shown)
    about = page.section(
        f"corpus-{name}",
        name,
        f"{len(shown)} of {many(corpus['samples'], 'sample')}: above the label, below what its tokens decode to. No tokenizer "
        f"was fitted on those held out ({'all' if held_out == len(shown) else held_out or 'none'} of these). ",
    )
    if any(isinstance(card.label, np.ndarray) for sample in shown for card in sample.cards):
        link = page.add(about, "a", "The sheet as one picture", href=page.picture(f"contact-{name}", _sheet(shown)))
        link.tail = "."
    if any(_has_null(card) for sample in shown for card in sample.cards):
        page.add(
            page.body, "p", "Dark gray: the label has no value there, and none is asked of its tokens.", class_="faint"
        )
    if class_names and any(card.modality == "segmentation" for sample in shown for card in sample.cards):
        _legend(page, class_names)
    for number, sample in enumerate(shown):
        _sample(page, sample, f"{name}-{number:02d}")


def _legend(page: Page, class_names: Sequence[str]) -> None:
    legend = page.add(page.body, "div", class_="legend")
    page.add(legend, "span", "segmentation:", class_="faint")
    for number, class_name in enumerate(class_names):
        red, green, blue = pictures.CATEGORIES[number % len(pictures.CATEGORIES)]
        swatch = page.add(page.add(legend, "span"), "svg", viewBox="0 0 1 1")
        page.add(swatch, "rect", width="1", height="1", fill=f"rgb({red} {green} {blue})")
        swatch.tail = class_name


def _sample(page: Page, sample: contact.Sample, stem: str) -> None:
    article = page.add(page.body, "article", class_="sample")
    header = page.add(article, "header")
    page.add(header, "h3", sample.source)
    if sample.is_held_out:
        page.add(header, "span", "held out", class_="badge")
    for name, value in sample.columns.items():
        if isinstance(value, str | int | float) and name != "caption":
            page.add(header, "span", f"{name}: {cell(value, 80)}", class_="faint")
    texts = page.add(article, "div", class_="texts")
    beside = page.add(article, "div", class_="beside")
    cards = page.add(beside, "div", class_="cards")
    for card in sample.cards:
        if isinstance(card.label, str) or isinstance(card.decoded, str):
            _text(page, texts, card)
        elif isinstance(card.label, Mapping) or isinstance(card.decoded, Mapping):
            _record(page, beside, card)
        else:
            _pictures(page, cards, card, f"{stem}-{card.modality}")


def _text(page: Page, parent: Element, card: contact.Card) -> None:
    page.add(parent, "p", cell(card.label, 1200) or f"no {card.modality} is kept")
    if card.decoded is not None:
        page.add(parent, "p", f"{_made(card)}: {cell(card.decoded, 1200)}", class_="from")


def _record(page: Page, parent: Element, card: contact.Card) -> None:
    figure = page.add(parent, "figure", class_="record")
    page.add(figure, "figcaption", card.modality)
    columns = {"label": card.label, _made(card): card.decoded}
    records = {words: record for words, record in columns.items() if isinstance(record, Mapping)}
    table = page.add(figure, "table")
    head = page.add(table, "tr")
    for words in ("", *records):
        page.add(head, "th", words, class_="number" if words else "text")
    for name in dict.fromkeys(name for record in records.values() for name in record):
        row = page.add(table, "tr")
        page.add(row, "th", str(name))
        for record in records.values():
            page.add(row, "td", cell(record.get(name), 60), class_="number")


def _pictures(page: Page, parent: Element, card: contact.Card, stem: str) -> None:
    figure = page.add(parent, "figure")
    page.add(figure, "figcaption", card.modality)
    for form, shown, words in (("label", card.label, "label"), ("tokens", card.decoded, _made(card))):
        if isinstance(shown, np.ndarray):
            path = page.picture(f"{stem}-{form}", shown)
            link = page.add(figure, "a", href=path)
            page.add(link, "img", src=path, alt=f"{card.modality}, {words}", loading="lazy")
        else:
            absent = "not kept" if form == "label" else "no tokens" if card.tokens is None else "not shown"
            page.add(figure, "div", absent, class_="none")
            words = "" if shown is None and form == "tokens" and card.tokens is None else words
        page.add(figure, "small", words)


def _has_null(card: contact.Card) -> bool:
    modality = contact.modality_of(card.modality)
    return isinstance(card.label, np.ndarray) and modality is not None and modality.null is not None


def _made(card: contact.Card) -> str:
    return "no tokens" if card.tokens is None else f"from {many(card.tokens, 'token')}"


def write_picture(shown: Sequence[contact.Sample], path: Path) -> None:
    """The samples as one picture, written as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_sheet(shown)).save(path, format="PNG")


def _sheet(shown: Sequence[contact.Sample]) -> np.ndarray:
    names = {card.modality for sample in shown for card in sample.cards}
    rows = [
        pictures.SheetRow(
            title=sample.source,
            note="held out" if sample.is_held_out else "",
            labels={card.modality: _sheet_cell(card.label) for card in sample.cards},
            decoded={card.modality: _sheet_cell(card.decoded) for card in sample.cards},
        )
        for sample in shown
    ]
    return np.array(pictures.sheet(rows, sorted(names, key=contact.order_of)))


def _sheet_cell(shown: contact.Cell) -> np.ndarray | str | None:
    if isinstance(shown, Mapping):
        return "\n".join(f"{name}  {cell(value, 20) or '-'}" for name, value in shown.items())
    return shown
