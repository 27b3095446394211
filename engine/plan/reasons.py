"""Tells what will be done and why, a line a modality: parts that are missing, stale, failed or left out by a selection."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.plan.corpus import CorpusPlan
from engine.plan.missing import Wanted, places_of, wanted_targets
from manifests.catalog.catalog import Catalog
from manifests.modality import Form
from manifests.queries import planning
from manifests.queries.planning import Count

Documents = Mapping[str, Mapping[str, Any]]


# The columns of `table` that hold numbers.
NUMBERS = (3, 4)


@dataclass(frozen=True, kw_only=True)
class NewSamples:
    """Counts the samples of a source that are not ingested yet, and the parts that they will be."""

    parts: int = 0
    rows: int = 0


@dataclass(frozen=True, kw_only=True)
class Line:
    """Holds one form of a modality of a corpus: its parts, how many are to do, and why."""

    corpus: str
    modality: str
    form: str
    parts: int
    to_do: int
    why: str


def lines(
    catalog: Catalog,
    plan: CorpusPlan,
    wanted: Wanted,
    *,
    unfitted: Collection[str] = (),
    new: NewSamples = NewSamples(),
) -> list[Line]:
    """Returns a line for each form of each modality of a corpus, those without work too, by modality.

    `unfitted` are the modalities whose tokenizer is still to be fitted; parts of `new` samples have all to do.
    """
    among = None if wanted.picked is None else wanted.picked.parts(plan.corpus)
    places = places_of([target for target in wanted_targets(plan) if target.form in wanted.forms])
    known = next((row for row in catalog.corpora() if row["corpus"] == plan.corpus), None)
    parts = len(among) if among is not None else known["parts"] if known else 0
    counts = planning.counts(catalog, plan.corpus, places, classes=wanted.retry or (), among=among)
    planned = {known.label.fingerprint: known.label.document() for known in plan.modalities.values()}
    documents = {**catalog.recipes(), **planned}
    forms: dict[tuple[str, Form], None] = dict.fromkeys((place[0], place[1]) for place in places)
    found = []
    for modality, form in forms:
        count = counts.get((modality, form), Count(modality=modality, form=form))
        to_do, reasons = _why(plan, count, parts, wanted, documents)
        if new.parts:
            reasons.append(f"{new.parts:,} of new samples")
        if form == "token" and modality in unfitted:
            reasons = ["its tokenizer is to be fitted first"]
        found.append(
            Line(
                corpus=plan.corpus,
                modality=modality,
                form=form,
                parts=parts + new.parts,
                to_do=to_do + new.parts,
                why=", ".join(reasons),
            )
        )
    return found


def table(found: Sequence[Line]) -> list[Sequence[str]]:
    """Returns the lines as rows of cells below a heading; forms of a modality with equal figures stand in one row.

    Columns `NUMBERS` hold numbers.
    """
    together: dict[tuple[str, str, int, int], list[Line]] = {}
    for line in found:
        together.setdefault((line.corpus, line.modality, line.parts, line.to_do), []).append(line)
    rows: list[Sequence[str]] = [("corpus", "modality", "form", "parts", "to do", "why")]
    for (corpus, modality, parts, to_do), forms in together.items():
        whys = dict.fromkeys(line.why for line in forms)
        why = next(iter(whys)) if len(whys) == 1 else "; ".join(f"{line.form}: {line.why}" for line in forms)
        rows.append((corpus, modality, "+".join(line.form for line in forms), f"{parts:,}", f"{to_do:,}", why))
    return rows


def _why(plan: CorpusPlan, count: Count, parts: int, wanted: Wanted, documents: Documents) -> tuple[int, list[str]]:
    """Returns how many parts are to do, and the reasons in words."""
    missing = parts - count.done - count.partial
    reasons = []
    if count.stale and count.before is not None:
        recipe = plan.modalities[count.modality].written()[count.form]
        what = "; ".join(changes(recipe.document(), documents.get(count.before), documents))
        reasons.append(f"{count.stale:,} stale ({what})")
    if count.begun:
        reasons.append(f"{count.begun:,} miss crops")
    if new := missing - count.stale - count.begun:
        reasons.append(f"{new:,} missing")
    if count.partial:
        told = "not selected before" if wanted.picked is None else "not selected before, perhaps now"
        reasons.append(f"{count.partial:,} with rows {told}")
    to_do = missing + count.partial
    if wanted.retry is not None and count.with_failures:
        classes = f" of {', '.join(sorted(wanted.retry))}" if wanted.retry else ""
        reasons.append(f"{count.with_failures:,} with failed rows{classes}")
        to_do = min(parts, to_do + count.with_failures)
    elif count.failed:
        reasons.append(f"{count.failed:,} failed rows stay (--failed)")
    return to_do, reasons


def changes(now: Mapping[str, Any], before: Mapping[str, Any] | None, documents: Documents) -> list[str]:
    """Returns which inputs of the fingerprint changed between two recipes of a modality and form, in words."""
    if before is None:
        return ["made by a recipe that the log does not know"]
    if now["producer"] != before["producer"]:
        return [f"{before['producer']} → {now['producer']}"]
    found = _differences(_facts(now), _facts(before))
    for name in sorted({*now["inputs"], *before["inputs"]}):
        ours, theirs = now["inputs"].get(name), before["inputs"].get(name)
        said = "label" if now["form"] == "token" else name
        if ours == theirs:
            continue
        if ours in documents and theirs in documents:
            found += [f"{said}: {text}" for text in changes(documents[ours], documents[theirs], documents)]
        elif name == "image" or ours is None or theirs is None:
            found.append(f"{name} {theirs} → {ours}")
        else:
            found.append(f"its {said}")
    return found or ["nothing that shows"]


def _facts(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what decides a recipe's output, beside its inputs, by name."""
    options = {name: document[name] or {} for name in ("parameters", "crop")}
    return {
        "version": document["version"],
        "tokenizer" if document["form"] == "token" else "weights": document["weights"],
        **{f"{part}.{name}": value for part, given in options.items() for name, value in given.items()},
    }


def _differences(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Returns names whose values differ, with both values if they are short."""
    found = []
    for name in {**now, **before}:
        ours, theirs = now.get(name), before.get(name)
        if ours != theirs:
            both = f"{theirs} → {ours}"
            found.append(f"{name} {both}" if len(both) <= 40 else name)
    return found
