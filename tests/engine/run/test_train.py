"""`modmill train FILE`: the file as YAML, overrides, what the log keeps, how it ends."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.cli.entry import main
from engine.pipeline import config as pipeline
from engine.run import job
from engine.run import train as train_run
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError
from manifests.snapshots import snapshot
from train.run import run_folder

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples/train/tiny.yaml"

PIPELINE = """
workspace: work
corpora:
  texts: {source: documents.jsonl, kind: text, key: key, modalities: [text]}
tokenizers:
  text: {vocabulary: 4500}
engine: {runner: local}
"""

FILE = """
name: small
steps: 4
mixture:
  - {snapshot: work#small}
model: {depth: 1, dim: 16, heads: 1}
sequence_tokens: 32
masking: {inputs: [4, 8], targets: [4, 8]}
deepspeed:
  train_batch_size: 4
  optimizer: {type: AdamW, params: {lr: 1e-3}}
  steps_per_print: 7
validation: {every: 2, rows: 4}
checkpoint: {every: 2}
log_every: 1
threads: 1
device: cpu
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train-run")


@pytest.fixture(scope="module")
def file(home: Path) -> Path:
    """A trainer file beside a workspace of documents and its snapshot."""
    words = ["a", "cube", "and", "sphere", "stand", "left", "right", "of", "the", "red", "cone", "on", "green", "grass"]
    with open(home / "documents.jsonl", "w") as documents:
        for number in range(120):
            text = " ".join(words[(number * step) % len(words)] for step in range(3, 20 + number % 7))
            documents.write(json.dumps({"key": f"d{number}", "text": text}) + "\n")
    (home / "pipeline.yaml").write_text(PIPELINE)
    job.run(pipeline.load(home / "pipeline.yaml"), quiet=True)
    with Catalog.open(str(home / "work")) as catalog:
        snapshot.make(catalog, "small", hold_out=0.1, run="test")
    path = home / "small.yaml"
    path.write_text(FILE)
    return path


def ended(arguments: list[str]) -> int:
    try:
        main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def runs(home: Path) -> list[dict[str, Any]]:
    with Catalog.open(str(home / "work")) as catalog:
        query = "SELECT run, kind, status, counts, config FROM runs WHERE kind = 'train' ORDER BY started_at"
        return catalog.sql(query).to_pylist()


def test_a_run_is_shown_recorded_and_gone_on_with(file: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(["train", str(file)]) == 0
    told = capsys.readouterr()
    assert "done: 4 steps, in " in told.out
    assert "note: deepspeed.steps_per_print has no effect: `log_every` of the trainer file decides" in told.err
    assert "guessing by frequency, held-out, nats a target: " in told.err
    assert "step 4: held-out loss " in told.err
    (recorded,) = runs(home)
    assert (home / "work/runs" / recorded["run"] / "metrics.jsonl").exists()
    assert (recorded["status"], recorded["counts"]) == ("done", '{"steps": 4}')
    assert '"snapshots":[{"sha256":' in recorded["config"].replace(" ", "")
    assert ended(["train", str(file), "--resume", "auto"]) == 0
    told = capsys.readouterr()
    assert "is at step 4 of 4: nothing to do" in told.err
    assert len(runs(home)) == 1
    assert ended(["train", str(file), "--resume", "auto", "--set", "steps=6"]) == 0
    assert "done: 2 steps" in capsys.readouterr().out
    again = runs(home)[1]
    assert again["run"].startswith(f"{recorded['run']}+4-")
    assert (again["status"], again["counts"]) == ("done", '{"steps": 2}')


def test_overrides_are_read_as_those_of_a_pipeline_file(
    file: Path, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    config = train_run.load(file, ["deepspeed.optimizer.params.lr=2e-3", "out=elsewhere", "validation.rows=0"])
    assert config.engine.optimizer.lr == 0.002
    assert config.out == str(tmp_path / "elsewhere")
    assert config.validation.rows == 0
    assert config.mixture[0].snapshot == f"{home / 'work'}#small"


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("steps: 4\nmixtures: []\n", [], r"t.yaml:2: mixtures is no option; did you mean 'mixture'\?"),
        (FILE, ["deepspeed.optimizer.params.lrr=1"], r"--set .*lrr=1: deepspeed.optimizer.params.lrr is no option"),
        (FILE, ["steps=-4"], r"--set steps=-4: steps is -4; it should be greater than 0"),
        (FILE.replace("depth: 1", "depth: one"), [], r"t.yaml:6: model.depth is 'one'; it should be a valid integer"),
        ("# nothing\n", [], r"t.yaml is empty, expected a mapping with `steps`, `mixture` and `deepspeed`"),
        ("steps: [\n", [], r"t.yaml:2:1: no valid YAML"),
    ],
)
def test_mistakes_are_told_with_their_place(tmp_path: Path, text: str, settings: list[str], message: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        train_run.load(path, settings)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tiny", "478aa918cd4a60fdb775dc29a17a62e51771e8c5b15fa1facae63923c4bdc63f"),
        ("scenes", "5f445bfb62ef8cb58fb5d5cd80a59a263ef7ad5ecf27be20d166018cbe569455"),
    ],
)
def test_the_identity_of_a_file_stays_so_that_older_runs_go_on(name: str, expected: str) -> None:
    config = train_run.load(ROOT / f"examples/train/{name}.yaml")
    snapshots: Any = [SimpleNamespace(sha256=f"{number:064x}") for number in range(len(config.mixture))]
    assert run_folder.identity(config, snapshots) == expected


def test_what_is_no_trainer_file_or_snapshot_exits_2(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(["train", str(tmp_path)]) == 2
    assert "is a folder, expected a trainer file" in capsys.readouterr().err
    assert ended(["train", str(tmp_path / "none.yaml")]) == 2
    assert "is not there, expected a trainer file" in capsys.readouterr().err
    path = tmp_path / "other.yaml"
    path.write_text(FILE.replace("work#small", f"{file.parent / 'work'}#smal"))
    assert ended(["train", str(path)]) == 2
    assert "smal" in capsys.readouterr().err


def test_sigterm_saves_and_exits_4(file: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = home / "work/runs"
    before = {path.name for path in folder.iterdir()}
    handler = signal.getsignal(signal.SIGTERM)
    killer = threading.Thread(target=kill_at_step_4, args=(folder, before))
    killer.start()
    try:
        code = ended(["train", str(file), "--set", "steps=100000", "--set", "validation.rows=0"])
    finally:
        killer.join()
        signal.signal(signal.SIGTERM, handler)
    told = capsys.readouterr().err
    assert code == 4, told
    assert "which is saved; go on with: modmill train" in told
    assert runs(home)[-1]["status"] == "interrupted"


def kill_at_step_4(folder: Path, before: set[str]) -> None:
    """Sends SIGTERM to this process once a new run in the folder has a line of step 4."""
    for _ in range(600):
        for run in {path.name for path in folder.iterdir()} - before:
            metrics = folder / run / "metrics.jsonl"
            if metrics.exists() and '"step": 4' in metrics.read_text():
                os.kill(os.getpid(), signal.SIGTERM)
                return
        time.sleep(0.05)


def test_the_example_is_read() -> None:
    config = train_run.load(EXAMPLE)
    assert config.notes == ()
    assert config.mixture[0].snapshot == f"{ROOT / 'demo-out/workspace'}#demo"
    assert [source.corpora for source in config.mixture] == [("scenes",), ("photos",), ("texts",)]
    assert (config.engine.batch, config.engine.accumulation, config.steps) == (16, 1, 520)
