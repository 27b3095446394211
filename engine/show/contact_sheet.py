"""Lays out the contact sheet of a corpus: a sample a row with all its modalities, on the page and as one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.show import contact, pictures
from engine.show.page import Page, cell, many


def contact_sheet(
    page: Page, corpus: Mapping[str, Any], shown: Sequence[contact.SheetSample], class_names: Sequence[str]
) -> dict[str, Any]:
    """Returns what the template shows of a corpus's samples, all modalities side by side, and writes their pictures."""
    name = corpus["corpus"]
    cards = [card for sample in shown for card in sample.cards]
    judged = sum(sample.is_judged for sample in shown)
    has_pictures = any(isinstance(card.label, np.ndarray) for card in cards)
    has_classes = any(card.modality == "segmentation" for card in cards)
    words = (
        f"{len(shown)} of {many(corpus['samples'], 'sample')}: above the label, below what its tokens decode to. "
        f"No tokenizer was fitted on those judged ({'all' if judged == len(shown) else judged or 'none'} of these). "
    )
    return {
        "name": name,
        "words": words if shown else "Nothing was made of its samples yet.",
        "sheet": page.picture(f"contact-{name}", _sheet(shown)) if has_pictures else "",
        "has_null": any(map(_has_null, cards)),
        "legend": [(class_name, _color(number)) for number, class_name in enumerate(class_names)]
        if has_classes
        else [],
        "samples": [_sample(page, sample, f"{name}-{number:02d}") for number, sample in enumerate(shown)],
    }


def _color(number: int) -> str:
    red, green, blue = pictures.CATEGORIES[number % len(pictures.CATEGORIES)]
    return f"rgb({red} {green} {blue})"


def _sample(page: Page, sample: contact.SheetSample, stem: str) -> dict[str, Any]:
    """Returns the cards of a sample by how they are shown: texts, records, pictures."""
    texts, records, drawn = [], [], []
    for card in sample.cards:
        if isinstance(card.label, str) or isinstance(card.decoded, str):
            decoded = "" if card.decoded is None else f"{_made(card)}: {cell(card.decoded, 1200)}"
            texts.append((cell(card.label, 1200) or f"no {card.modality} is kept", decoded))
        elif isinstance(card.label, Mapping) or isinstance(card.decoded, Mapping):
            records.append(_record(card))
        else:
            drawn.append({"modality": card.modality, "sides": _sides(page, card, f"{stem}-{card.modality}")})
    return {
        "source": sample.source,
        "is_judged": sample.is_judged,
        "facts": [
            f"{name}: {cell(value, 80)}"
            for name, value in sample.columns.items()
            if isinstance(value, str | int | float) and name != "caption"
        ],
        "texts": texts,
        "records": records,
        "pictures": drawn,
    }


def _record(card: contact.Card) -> dict[str, Any]:
    columns = {"label": card.label, _made(card): card.decoded}
    records = {words: record for words, record in columns.items() if isinstance(record, Mapping)}
    names = dict.fromkeys(name for record in records.values() for name in record)
    rows = [(str(name), [record.get(name) for record in records.values()]) for name in names]
    return {"modality": card.modality, "columns": list(records), "rows": rows}


def _sides(page: Page, card: contact.Card, stem: str) -> list[dict[str, str]]:
    """Returns the label above and the decoded tokens below: a picture's path, or why there is none."""
    sides = []
    for form, shown, words in (("label", card.label, "label"), ("tokens", card.decoded, _made(card))):
        path = page.picture(f"{stem}-{form}", shown) if isinstance(shown, np.ndarray) else ""
        absent = "not kept" if form == "label" else "no tokens" if card.tokens is None else "not shown"
        words = "" if shown is None and form == "tokens" and card.tokens is None else words
        sides.append({"path": path, "absent": absent, "words": words})
    return sides


def _has_null(card: contact.Card) -> bool:
    modality = contact.modality_of(card.modality)
    return isinstance(card.label, np.ndarray) and modality is not None and modality.null is not None


def _made(card: contact.Card) -> str:
    return "no tokens" if card.tokens is None else f"from {many(card.tokens, 'token')}"


def write_picture(shown: Sequence[contact.SheetSample], path: Path) -> None:
    """Writes the samples as one picture, a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_sheet(shown)).save(path, format="PNG")


def _sheet(shown: Sequence[contact.SheetSample]) -> np.ndarray:
    names = {card.modality for sample in shown for card in sample.cards}
    rows = [
        pictures.SheetRow(
            title=sample.source,
            note="judged" if sample.is_judged else "",
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
