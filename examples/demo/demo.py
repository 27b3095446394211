"""Runs the demo: photographs, scenes and texts that come with a clone, through the whole pipeline, to a report with pictures.

Three corpora are laid out under the given folder as a user would have them (`sources/`), with a pipeline file beside them
that can be run again. What is there already is not made again.
"""

import csv
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import scenes as scene_files
from engine.pipeline import config as pipeline
from engine.progress.progress import Progress
from engine.progress.record import Done
from engine.run import job
from engine.show.page import Page, PageSection
from engine.show.report import Question, write_report
from manifests.errors import ConfigError
from manifests.snapshots.snapshot import open_snapshot

HERE = Path(__file__).resolve().parent
SCENES = 600
SNAPSHOT = "demo"
# Where the packages that bring photographs keep them, and what to install for them.
_PACKAGES = {"scikit-image": ("skimage", "data"), "scikit-learn": ("sklearn", "datasets/images")}

# The first line of the demo's pipeline file, as it is and as it was when the demo was a verb.
_OURS = re.compile("# The pipeline of `(make|modmill) demo`")

QUESTIONS: tuple[Question, ...] = (
    Question(
        words="Which scenes tell of a red cube, and hold a cube that covers over 10 % of the picture?",
        query="SELECT s.source, round(100 * b.area, 1) AS percent, c.caption\n"
        "FROM boxes b JOIN captions c USING (corpus, key) JOIN samples s USING (corpus, key)\n"
        "WHERE corpus = 'scenes' AND b.class = 'cube' AND b.area > 0.1 AND c.caption LIKE '%red cube%'\n"
        "ORDER BY b.area DESC",
    ),
    Question(
        words="Which photographs are the most colorful, and what do they show?",
        query="SELECT s.source, round(m.colorfulness, 1) AS colorfulness, round(m.entropy, 2) AS entropy_bits, "
        "c.caption\nFROM metadata m JOIN samples s USING (corpus, key) JOIN captions c USING (corpus, key)\n"
        "WHERE corpus = 'photos' ORDER BY m.colorfulness DESC LIMIT 6",
    ),
    Question(
        words="How many tokens does each modality of each corpus have, and what does one weigh on disk?",
        query="SELECT corpus, modality, sum(tokens) AS tokens, any_value(vocabulary) AS vocabulary,\n"
        "  round(8 * sum(size_bytes) / sum(tokens), 1) AS bits_per_token\n"
        "FROM shards WHERE is_current AND form = 'token' GROUP BY ALL ORDER BY corpus, tokens DESC",
    ),
)


def run_demo(out: Path, *, workers: int | None = None, scenes: int = SCENES, settings: Sequence[str] = ()) -> Path:
    """Lays out the sources and the pipeline file in `out`, runs it, and writes the report; the report's path.

    `scenes` is how many are rendered if there are none yet, `settings` are overrides as `modmill run --set` takes
    them. Raises ConfigError if a package that brings photographs is missing, or if `out` holds another pipeline file.
    """
    progress = Progress(None)
    try:
        progress.say(f"the demo's sources: {out / 'sources'}")
        lay_out(out, scenes, progress.say)
    finally:
        progress.close()
    overrides = [*settings, *([f"engine.workers={workers}"] if workers else [])]
    config = pipeline.load(out / "pipeline.yaml", overrides)
    done = job.run(config, kind="demo")
    progress = Progress(None)
    try:
        if done.did_nothing:
            progress.say("nothing was missing")
        progress.say("writing the report")
    finally:
        progress.close()
    return write_report(
        os.path.relpath(config.workspace) if Path(config.workspace).is_relative_to(Path.cwd()) else config.workspace,
        out,
        title="modmill demo",
        questions=QUESTIONS,
        class_names=scene_files.CLASSES,
        more=_model_section(config, done, scene_files.COLORS),
    )


def _model_section(
    config: pipeline.PipelineConfig, done: Done, colors: Mapping[str, tuple[int, int, int]]
) -> list[Callable[[Page], PageSection]]:
    """Returns what makes the section of the report on the model that was trained, if one was."""
    folder = done.training_folder
    if folder is None:
        return []

    def section(page: Page) -> PageSection:
        from examples.demo.model import model_section

        return model_section(page, Path(folder), open_snapshot(f"{config.workspace}#{SNAPSHOT}"), colors)

    return [section]


def _trainer_file() -> str:
    """Returns the trainer file of the examples, with its paths as the demo's folder has them."""
    text = (HERE.parent / "train" / "tiny.yaml").read_text(encoding="utf-8")
    return text.replace("../../demo-out/workspace#", "workspace#")


def lay_out(out: Path, scenes: int, say: Callable[[str], None]) -> None:
    """Writes what is missing of the sources and the pipeline file."""
    ours = (HERE / "pipeline.yaml").read_text(encoding="utf-8")
    file, sources = out / "pipeline.yaml", out / "sources"
    if file.exists() and not _OURS.match(file.read_text(encoding="utf-8")):
        raise ConfigError(f"{file} is another pipeline's file; give the demo a folder of its own with --out")
    (sources / "texts").mkdir(parents=True, exist_ok=True)
    _copy_photographs(HERE / "photographs.csv", sources)
    for text in sorted((HERE / "texts").iterdir()):
        _copy(text, sources / "texts" / text.name)
    if not (sources / "scenes").exists():
        say(f"rendering {scenes:,} scenes")
        _render(sources / "scenes", scenes)
    for target, text in ((file, ours), (out / "train.yaml", _trainer_file())):
        if not target.exists():
            target.write_text(text, encoding="utf-8")


def _copy_photographs(table: Path, sources: Path) -> None:
    """Copies the photographs that the table names out of the packages that bring them, byte for byte."""
    (sources / "photos").mkdir(parents=True, exist_ok=True)
    with table.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            package, folder = _PACKAGES[row["package"]]
            found = importlib.util.find_spec(package)
            if found is None or found.origin is None:
                raise ConfigError(
                    f"the demo needs {row['package']}, which brings {row['file']} and is not installed; "
                    "`make demo` installs it, or: pip install modmill[dev]"
                )
            _copy(Path(found.origin).parent / folder / row["file"], sources / "photos" / row["file"])
    _copy(table, sources / table.name)


def _copy(source: Path, target: Path) -> None:
    """Copies a file that is not there yet, whole or not at all."""
    if target.exists():
        return
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def _render(folder: Path, count: int) -> None:
    """Renders scenes into a folder that appears when all of them are there."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".scenes-") as scratch:
        scene_files.write(Path(scratch) / "scenes", count)
        os.replace(Path(scratch) / "scenes", folder)
