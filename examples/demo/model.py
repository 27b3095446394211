"""Judges the demo's model for its report: loss curves, generated examples of scenes it never saw, and how right they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from engine.inference.sheets import SheetLine, sheet
from engine.show.page import Chart, Page, PageBlock, PageSection, chart, many
from examples.demo import scores as demo_scores
from manifests.snapshots.snapshot import Snapshot
from train.data.loader import Loader
from train.data.mixture import MixtureEntry
from train.generation.generator import Tokenizers, generate
from train.run.checkpoint import Checkpoint, open_checkpoint
from train.run.metrics import FILE, read_lines

SHOWN = 6
JUDGED = 48
PALETTES = 5
_SEED = 1
_STEER = "a large {color} sphere on a checkered floor"
FROM_RGB = ("caption", "edges", "depth", "boxes")

Colors = Mapping[str, tuple[int, int, int]]


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Holds held-out scenes: rows of tokens by modality, and the labels that these decode to."""

    tokens: Mapping[str, list[np.ndarray]]
    labels: Mapping[str, list[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.tokens.values())))


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Holds what the model made of held-out scenes: `rgb` from their captions, and each of `FROM_RGB` from their pixels."""

    scenes: Scenes
    labels: Mapping[str, list[Any]]


def held_out(snapshot: Snapshot, checkpoint: Checkpoint, tokenizers: Tokenizers, most: int = JUDGED) -> Scenes:
    """Returns the first held-out scenes of a snapshot."""
    entry = MixtureEntry(snapshot=snapshot, corpora=("scenes",), weight=1.0)
    with Loader([entry], vocabulary=checkpoint.vocabulary, seed=0, batch=most) as loader:
        batch = next(iter(loader.held_out_batches(most)))
    tokens = {}
    for name in ("rgb", "palette", *FROM_RGB):
        column = batch.columns[name]
        tokens[name] = [
            column.values[begin:end].astype(np.int64)
            for begin, end in zip(column.offsets[:-1], column.offsets[1:], strict=True)
        ]
    labels = {name: tokenizers.decode(name, rows) for name, rows in tokens.items()}
    return Scenes(tokens=tokens, labels=labels)


def make(checkpoint: Checkpoint, tokenizers: Tokenizers, scenes: Scenes) -> Generated:
    """Generates from every scene; no row is made twice or chosen among."""
    made = {"rgb": generate(checkpoint.model, {"caption": scenes.tokens["caption"]}, ["rgb"], seed=_SEED)["rgb"]}
    for name in FROM_RGB:
        made[name] = generate(checkpoint.model, {"rgb": scenes.tokens["rgb"]}, [name], seed=_SEED)[name]
    return Generated(scenes=scenes, labels={name: tokenizers.decode(name, rows) for name, rows in made.items()})


def scores(generated: Generated, colors: Colors) -> list[dict[str, Any]]:
    """Returns rows of a table: what was judged, the model's figure, what needs no model, and the best that tokens allow."""
    scenes, labels, hues = generated.scenes, generated.labels, demo_scores.chromatic(colors)
    captions = scenes.labels["caption"]
    others = [*captions[1:], captions[0]]

    def color(pictures: Sequence[np.ndarray], words: Sequence[str]) -> float:
        hits, named = demo_scores.color_recall(pictures, words, hues)
        return hits / max(named, 1)

    depth, boxes = scenes.labels["depth"], scenes.labels["boxes"]
    mean_depth = [np.mean(depth, axis=0)] * len(depth)
    named = demo_scores.color_recall(labels["rgb"], captions, hues)[1]
    return [
        {
            "what": f"caption to rgb: colors that the captions name ({named}) found in the picture, share",
            "model": color(labels["rgb"], captions),
            "without looking": color(labels["rgb"], others),
            "true tokens": color(scenes.labels["rgb"], captions),
        },
        {
            "what": "rgb to caption: colors that the captions name found in the caption made, share",
            "model": _shared_words(labels["caption"], captions, set(hues)),
            "without looking": _shared_words(labels["caption"], others, set(hues)),
            "true tokens": 1.0,
        },
        {
            "what": "rgb to depth: error in standard deviations (less is better)",
            "model": demo_scores.depth_error(labels["depth"], depth),
            "without looking": demo_scores.depth_error(mean_depth, depth),
            "true tokens": 0.0,
        },
        {
            "what": "rgb to boxes: F1 of boxes of the right class that overlap by half",
            "model": demo_scores.box_f1(labels["boxes"], boxes),
            "without looking": demo_scores.box_f1([*boxes[1:], boxes[0]], boxes),
            "true tokens": 1.0,
        },
        {
            "what": "rgb to boxes: the same, whatever the class",
            "model": demo_scores.box_f1(labels["boxes"], boxes, classes=False),
            "without looking": demo_scores.box_f1([*boxes[1:], boxes[0]], boxes, classes=False),
            "true tokens": 1.0,
        },
    ]


def model_section(page: Page, run: Path, snapshot: Snapshot, colors: Colors) -> PageSection:
    """Returns the section "A tiny model" of the demo's report, on the run in a folder."""
    checkpoint = open_checkpoint(run)
    tokenizers = Tokenizers(checkpoint.vocabulary, checkpoint.workspaces)
    generated = make(checkpoint, tokenizers, held_out(snapshot, checkpoint, tokenizers))
    parameters = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    drawn = {**sheets(generated), **_steering(checkpoint, tokenizers, generated.scenes)}
    return PageSection(
        anchor="model",
        heading="A tiny model",
        words=f"Trained here from nothing for {checkpoint.step:,} steps: {parameters / 1e6:.1f} million parameters, a "
        "thousandth of what such models have, on a few hundred scenes and a handful of photographs. It shows that the way "
        "from photographs to a model that draws is whole, and no more: so short a training teaches how scenes look on the "
        "whole and little of what was asked for; how little, the table says, against what needs no look at the input. All "
        f"pictures are of the first {SHOWN} held-out scenes, all figures of {many(len(generated.scenes), 'held-out scene')}; "
        "none was chosen.",
        blocks=[
            PageBlock(
                heading="Loss of each modality",
                words="Nats a target over the steps: the line is training, the dots are held-out rows; the dashed line is what "
                "guessing each token by its frequency costs on held-out rows.",
                charts=_curves(read_lines(run / FILE), checkpoint),
            ),
            PageBlock(
                heading="How right it is",
                words="Beside the model stand what needs no look at the input (pictures judged by another scene's caption, the "
                "mean depth, another scene's boxes) and what the tokens of the true picture reach.",
                table=pa.Table.from_pylist(scores(generated, colors)),
            ),
            *(
                PageBlock(heading=heading, picture=page.picture(heading.lower().replace(" ", "-"), picture))
                for heading, picture in drawn.items()
            ),
        ],
    )


def _shared_words(found: Sequence[str], true: Sequence[str], words: set[str]) -> float:
    """Returns the share of those `words` in the true texts that are also in the found ones."""
    named = [words & set(text.split()) for text in true]
    hits = sum(len(some & set(text.split())) for some, text in zip(named, found, strict=True))
    return hits / max(sum(map(len, named)), 1)


def sheets(generated: Generated, most: int = SHOWN) -> dict[str, np.ndarray]:
    """Returns sheets of the first scenes by heading: pictures made from captions, and all that was made from pictures."""
    labels, count = generated.scenes.labels, min(most, len(generated.scenes))
    from_captions = [
        SheetLine(
            given={"caption": labels["caption"][number]},
            generated={"rgb": generated.labels["rgb"][number]},
            title=f"scene {number + 1}",
        )
        for number in range(count)
    ]
    from_pictures = [
        SheetLine(
            given={"rgb": labels["rgb"][number]},
            generated={name: generated.labels[name][number] for name in FROM_RGB},
        )
        for number in range(count)
    ]
    return {
        heading: sheet(rows, title=heading, note=note)
        for heading, rows, note in (
            ("From captions to pictures", from_captions, "held-out captions; rgb in 25 steps"),
            ("From pictures to all", from_pictures, "held-out scenes; each from rgb alone"),
        )
    }


def _steering(checkpoint: Checkpoint, tokenizers: Tokenizers, scenes: Scenes) -> dict[str, np.ndarray]:
    """Returns a sheet of one caption under the palettes of five scenes, by its heading."""
    caption = scenes.labels["caption"][0]
    palettes = scenes.tokens["palette"][:PALETTES]
    given = {"caption": [scenes.tokens["caption"][0]] * len(palettes), "palette": palettes}
    made = generate(checkpoint.model, given, ["rgb"], seed=_SEED, samples=len(palettes))["rgb"]
    rows = [
        SheetLine(given={"caption": caption, "palette": palette}, generated={"rgb": picture})
        for palette, picture in zip(scenes.labels["palette"], tokenizers.decode("rgb", made), strict=False)
    ]
    heading = "One caption under five palettes"
    return {heading: sheet(rows, title=heading, note="the palettes are those of held-out scenes")}


def _curves(lines: Sequence[Mapping[str, Any]], checkpoint: Checkpoint) -> list[Chart]:
    """Returns the loss of each modality over the steps, beside what guessing by frequency costs."""
    guessing = next((line for line in lines if line["kind"] == "unigram"), {})
    charts = []
    for modality in checkpoint.vocabulary.modalities:
        points = {
            kind: [
                (line["step"], line["losses"][modality.name])
                for line in lines
                if line["kind"] == kind and line["losses"].get(modality.name) is not None
            ]
            for kind in ("train", "validation")
        }
        level = guessing.get("held_out", {}).get(modality.name)
        words = []
        if points["validation"]:
            by_frequency = "" if level is None else f"; by frequency {level:.2f}"
            words.append(f"held-out {points['validation'][-1][1]:.2f} nats a target{by_frequency}")
        line, dots = points["train"], points["validation"]
        charts.append(chart(modality.name, words, line=line, dots=dots, level=level))
    return charts
