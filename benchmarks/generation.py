"""Measures how right a small model is on scenes it never saw: `python -m benchmarks.generation [--quick] [--json]`.

Renders scenes, runs a pipeline over them (rgb, depth, edges, boxes and captions, with their tokenizers), trains
`examples/train/scenes.yaml` (about 15 minutes of one core), and generates from the first 48 held-out scenes, with the
defaults of `modmill generate`; they are not chosen. Prints what it does, and last one line of JSON:

    train_cpu_min           CPU time of the training, all threads together
    steps, parameters
    color_in_picture        of the colors that captions name, the share found in the pictures made from them
    color_in_caption        the share found in the captions made from the pictures
    depth_error             mean difference of standardized depth, in standard deviations
    boxes_f1, boxes_any_f1  F1 of boxes that overlap by half: of the right class, of any
    ..._blind               the same without a look at the input: another scene's caption or boxes, the mean depth

Sheets of the first six scenes lie beside the run, in FOLDER. What is there already is not made again.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import scenes

TRAINER_FILE = Path(__file__).resolve().parent.parent / "examples" / "train" / "scenes.yaml"
FIGURES = ("color_in_picture", "color_in_caption", "depth_error", "boxes_f1", "boxes_any_f1")
PIPELINE = """\
workspace: workspace
corpora:
  scenes:
    source: scenes/images
    modalities:
      rgb: {keep: true}
      edges:
      palette:
      depth: {parameters: {path: "../depth/{stem}.png", scale: 0.001, "null": 0}}
      boxes: {labeler: files, parameters: {path: "../boxes/{stem}.json"}}
      caption:
tokenizers:
  rgb: {steps: 400}
  edges: {steps: 300}
  depth: {steps: 120}
  text: {vocabulary: 6000}
fit_rows: 600
snapshots:
  scenes: {hold_out: 0.03}
engine: {workers: 2}
"""


def measure(folder: Path, *, count: int, steps: int | None) -> dict[str, Any]:
    """Makes what is missing in `folder`, trains, and judges."""
    from engine.pipeline import config as pipeline
    from engine.run import job
    from engine.run import train as train_run
    from examples.demo import model
    from manifests.pixels import images
    from manifests.snapshots.snapshot import open_snapshot
    from train.generation.generator import Tokenizers
    from train.run.checkpoint import open_checkpoint

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "scenes").exists():
        scenes.write(folder / ".scenes", count)
        (folder / ".scenes").rename(folder / "scenes")
    (folder / "pipeline.yaml").write_text(PIPELINE)
    job.run(pipeline.load(folder / "pipeline.yaml"))
    uri = f"{folder.absolute() / 'workspace'}#scenes"
    settings = [f"mixture=[{{snapshot: '{uri}'}}]", *([] if steps is None else [f"steps={steps}"])]
    began = time.process_time()
    outcome = train_run.run(train_run.load(TRAINER_FILE, settings), resume="auto")
    train_cpu_min = (time.process_time() - began) / 60
    checkpoint = open_checkpoint(outcome.folder)
    tokenizers = Tokenizers(checkpoint.vocabulary, checkpoint.workspaces)
    judged = model.held_out(open_snapshot(uri), checkpoint, tokenizers)
    generated = model.make(checkpoint, tokenizers, judged)
    for heading, picture in model.sheets(generated).items():
        path = folder / f"{heading.lower().replace(' ', '-')}.png"
        path.write_bytes(images.encode_png(picture))
        print(f"look at it: {path}", file=sys.stderr)
    found: dict[str, Any] = {"train_cpu_min": train_cpu_min, "steps": outcome.step}
    found["parameters"] = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    for name, row in zip(FIGURES, model.scores(generated, scenes.COLORS), strict=True):
        print(f"{row['what']}: {row['model']:.3f}; without looking {row['without looking']:.3f}", file=sys.stderr)
        found[name], found[f"{name}_blind"] = row["model"], row["without looking"]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs it in the folder, or in a temporary one."""
    parser = argparse.ArgumentParser(description="How right a small model is on scenes it never saw.")
    parser.add_argument("--out", type=Path, help="the folder that keeps all of it; by default one that is removed")
    parser.add_argument("--quick", action="store_true", help="120 scenes and 20 steps: whether it runs, no figures")
    parser.add_argument("--json", action="store_true", help="the line of JSON alone on standard output")
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--steps", type=int, help="instead of the trainer file's")
    options = parser.parse_args(arguments)
    count, steps = (120, 20) if options.quick else (options.scenes, options.steps)
    with tempfile.TemporaryDirectory(prefix="modmill-generation-") as scratch:
        figures = measure(options.out or Path(scratch), count=count, steps=steps)
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
