"""A whole run on random tokens: it learns, it is cut as the batch says, it is killed and goes on bit for bit."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from manifests.errors import ConfigError, UserError
from manifests.store.storage import Storage, open_storage
from train.model import loss
from train.run import checkpoint
from train.run.metrics import read_lines
from train.run.run import TrainingResult, train
from train.settings.trainer import TrainConfig, parse

ROOT = Path(__file__).parents[3]
MODALITIES = ("caption", "edges", "palette")
STEPS = 16


@pytest.fixture(scope="module")
def workspace(token_workspace: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = token_workspace(
        tmp_path_factory.mktemp("train") / "work", {"scenes": (80, MODALITIES), "texts": (40, ("text",))}
    )
    made.snapshot("small", where="corpus = 'scenes'", hold_out=0.1)
    made.snapshot("all", hold_out=0.1)
    return made


def tree(workspace: Any, out: Path, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "name": "small",
        "out": str(out),
        "seed": 3,
        "steps": STEPS,
        "mixture": [{"snapshot": f"{workspace.uri}#small"}],
        "model": {"depth": 1, "dim": 32, "heads": 2},
        "sequence_tokens": 48,
        "masking": {"inputs": [8, 24], "targets": [8, 24]},
        "deepspeed": {
            "train_batch_size": 8,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.05}},
            "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 4, "warmup_type": "linear"}},
        },
        "validation": {"every": 8, "rows": 16},
        "checkpoint": {"every": 5},
        "log_every": 1,
        "threads": 1,
        "device": "cpu",
    }
    return options | changes


def config(workspace: Any, out: Path, **changes: Any) -> TrainConfig:
    return parse(tree(workspace, out, **changes), folder=out)


def lines(outcome: TrainingResult, kind: str = "train") -> dict[int, dict[str, Any]]:
    found = [line for line in read_lines(Path(outcome.folder) / "metrics.jsonl") if line["kind"] == kind]
    assert len({line.get("step") for line in found}) == len(found)
    return {line.get("step", 0): line for line in found}


def losses(outcome: TrainingResult) -> dict[int, tuple[Any, ...]]:
    """What must be equal to the bit, by step."""
    return {at: (one["loss"], one["losses"], one["gradient_norm"], one["lr"]) for at, one in lines(outcome).items()}


@pytest.fixture(scope="module")
def whole(workspace: Any, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """The run that nothing interrupts."""
    return train(config(workspace, tmp_path_factory.mktemp("whole")))


def test_the_loss_falls_and_the_run_is_told_in_its_folder(workspace: Any, whole: TrainingResult) -> None:
    assert (whole.status, whole.step, whole.steps_done) == ("done", STEPS, STEPS)
    told = lines(whole)
    assert list(told) == list(range(1, STEPS + 1))
    assert told[STEPS]["loss"] < told[1]["loss"] - 0.5
    assert set(told[1]["losses"]) == set(MODALITIES)
    assert told[1]["lr"] == 0.0
    assert told[5]["lr"] == pytest.approx(0.01)
    assert told[STEPS]["lr"] < 0.001
    validated = lines(whole, "validation")
    assert list(validated) == [8, 16]
    assert validated[8]["targets"] == validated[16]["targets"]
    guess = lines(whole, "unigram")[0]
    for name, entropy in guess["entropies"].items():
        # A model that knows nothing yet has about the loss of uniform guessing, which no entropy is over.
        assert 0 < entropy <= told[1]["losses"][name] + 0.3
        assert guess["held_out"][name] > 0
    assert sorted(path.name for path in (Path(whole.folder) / "checkpoints").iterdir()) == [
        "step-00000015",
        "step-00000016",
    ]
    opened = checkpoint.open_checkpoint(whole.folder)
    assert opened.step == STEPS
    assert opened.workspaces == dict.fromkeys(MODALITIES, workspace.uri)
    assert [one.name for one in opened.vocabulary.modalities] == list(MODALITIES)
    assert not opened.model.training


def test_a_second_run_has_the_same_losses(workspace: Any, whole: TrainingResult, tmp_path: Path) -> None:
    again = train(config(workspace, tmp_path, steps=4, workers=0))
    first = losses(whole)
    # The schedule ends with the run, so only the warm-up is the same.
    assert losses(again) == {step: first[step] for step in range(1, 5)}
    assert again.run != whole.run


def test_micro_batches_add_up_to_the_step(workspace: Any, tmp_path: Path) -> None:
    engine = {"optimizer": {"params": {"lr": 0.003}}}
    cut = {**engine, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}
    at_once = train(config(workspace, tmp_path / "a", steps=3, deepspeed={**engine, "train_batch_size": 8}))
    in_parts = train(config(workspace, tmp_path / "b", steps=3, deepspeed=cut))
    for step, line in lines(at_once).items():
        other = lines(in_parts)[step]
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-5)
        assert other["gradient_norm"] == pytest.approx(line["gradient_norm"], rel=1e-4)
        assert other["losses"] == pytest.approx(line["losses"], rel=1e-5)


HANGS = """
import json, sys, time
from pathlib import Path
from train.settings.trainer import parse
from train.run.run import train

def report(kind, facts):
    print(kind, facts.get("step"), flush=True)
    if kind == "train" and facts["step"] == 7:
        time.sleep(300)

train(parse(json.loads(sys.argv[1]), folder=Path(".")), report=report)
"""


@pytest.mark.slow
def test_after_sigkill_the_next_losses_are_those_of_the_whole_run(
    workspace: Any, whole: TrainingResult, tmp_path: Path
) -> None:
    options = tree(workspace, tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", HANGS, json.dumps(options)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.split() == ["train", "7"]:
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL
    said: list[str] = []
    resumed = train(
        parse(options, folder=tmp_path),
        resume="auto",
        report=lambda kind, facts: said.append(f"{kind} {facts.get('text')}"),
    )
    assert any("goes on from" in text and "step-00000005" in text for text in said)
    assert (resumed.step, resumed.steps_done) == (STEPS, STEPS - 5)
    assert len(list(tmp_path.iterdir())) == 1
    # One story: steps 6 and 7, which the killed process wrote too, stand there once; more than ten steps follow.
    assert losses(resumed) == losses(whole)
    assert lines(resumed, "validation")[16]["losses"] == lines(whole, "validation")[16]["losses"]


def test_a_finished_run_says_so_and_a_longer_one_goes_on(workspace: Any, tmp_path: Path) -> None:
    first = train(config(workspace, tmp_path, steps=2, validation={"rows": 0}))
    said: list[str] = []

    def report(kind: str, facts: Mapping[str, Any]) -> None:
        said.append(str(facts.get("text")))

    again = train(config(workspace, tmp_path, steps=2, validation={"rows": 0}), resume="auto", report=report)
    assert (again.run, again.steps_done) == (first.run, 0)
    assert any("nothing to do" in text for text in said)
    longer = train(config(workspace, tmp_path, steps=4), resume=first.folder)
    assert (longer.run, longer.step, longer.steps_done) == (first.run, 4, 2)
    other = train(config(workspace, tmp_path, steps=1, seed=4), resume="auto", report=report)
    assert other.run != first.run
    assert any("a new run begins" in text for text in said)


def test_a_run_that_began_before_there_was_a_choice_keeps_its_rule_for_overlong_targets(
    workspace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules: list[str | None] = []

    def report(kind: str, facts: Mapping[str, Any]) -> None:
        if kind == "run":
            rules.append(facts["config"]["config"]["masking"].get("overlong"))

    def trained(steps: int, **masking: Any) -> TrainingResult:
        options = {"masking": {"inputs": [8, 24], "targets": [8, 24], **masking}, "validation": {"rows": 0}}
        return train(config(workspace, tmp_path, steps=steps, **options), resume="auto", report=report)

    with monkeypatch.context() as patch:
        patch.setattr("train.run.run._with_rule", lambda config, saved: config)
        before = trained(1)
    assert [trained(steps).run for steps in (2, 3)] == [before.run] * 2
    other = trained(1, overlong="fill")
    assert other.run != before.run
    again = train(config(workspace, tmp_path / "new", steps=1, validation={"rows": 0}), report=report)
    assert again.run != before.run
    assert rules == [None, "random", "random", "fill", "fill"]


def test_sigterm_ends_after_the_step_with_a_checkpoint(workspace: Any, tmp_path: Path) -> None:
    assert threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)

    def report(kind: str, facts: Mapping[str, Any]) -> None:
        if kind == "train" and facts["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = train(config(workspace, tmp_path), report=report)
    assert stopped.status == "interrupted"
    assert stopped.step in (2, 3)
    assert checkpoint.find(stopped.folder).step == stopped.step
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_full_disk_is_said_and_the_checkpoint_before_it_stays(
    workspace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Storage.put

    def full(self: Storage, path: str, data: Any) -> bool:
        if "step-00000010/optimizer" in path:
            raise OSError(28, "No space left on device")
        return put(self, path, data)

    monkeypatch.setattr(Storage, "put", full)
    with pytest.raises(UserError, match=r"disk of .* is full.*step 10.*step-00000005 stays"):
        train(config(workspace, tmp_path))
    monkeypatch.undo()
    (run,) = tmp_path.iterdir()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000005"]
    assert train(config(workspace, tmp_path), resume="auto").steps_done == STEPS - 5


def test_a_loss_that_is_not_finite_names_step_and_rows(
    workspace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = loss.total
    calls = []

    def broken(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return total(*arguments) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(loss, "total", broken)
    with pytest.raises(UserError, match=r"step 3: the loss is nan on scenes part \d+ row \d+, .* and 4 more"):
        train(config(workspace, tmp_path))


def test_several_snapshots_mix_and_another_mixture_is_no_continuation(workspace: Any, tmp_path: Path) -> None:
    mixture = [
        {"snapshot": f"{workspace.uri}#all", "corpora": ["texts"], "weight": 1},
        {"snapshot": f"{workspace.uri}#all", "corpora": ["scenes"], "weight": 3},
    ]
    run = train(config(workspace, tmp_path, steps=2, mixture=mixture))
    assert set(lines(run)[1]["losses"]) == {*MODALITIES, "text"}
    with pytest.raises(ConfigError, match=r"trained on another 'text' .*, they have no such modality"):
        train(config(workspace, tmp_path, steps=4), resume=run.folder)
    mixture[0]["weight"] = 2
    with pytest.raises(ConfigError, match=r"weights \[1.0, 3.0\], this run has \[2.0, 3.0\]"):
        train(config(workspace, tmp_path, steps=4, mixture=mixture), resume=run.folder)
    mixture[0]["weight"] = 1
    with pytest.raises(ConfigError, match="give it the same `model`"):
        train(config(workspace, tmp_path, steps=4, mixture=mixture, model={"depth": 1}), resume=run.folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_weights": {"captoin": 2.0}}, "loss_weights: no modality 'captoin'.*did you mean 'caption'"),
        ({"mixture": [{"snapshot": "SNAPSHOT", "corpora": ["scene"]}]}, "no corpus 'scene'; did you mean 'scenes'"),
        ({"device": "cuda:7"}, "device 'cuda:7' cannot be used here"),
        (
            {"masking": {"strategies": [{"inputs": {"rgb2": 1.0}}]}},
            r"masking.strategies\[0\].inputs: no modality 'rgb2'",
        ),
    ],
)
def test_what_the_snapshots_do_not_have_is_named(
    workspace: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    for entry in changes.get("mixture", []):
        entry["snapshot"] = f"{workspace.uri}#small"
    with pytest.raises(ConfigError, match=message):
        train(config(workspace, tmp_path, **changes))
    assert list(tmp_path.iterdir()) == []


def test_resume_of_what_is_no_run_is_refused(workspace: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no checkpoint and no run's folder"):
        train(config(workspace, tmp_path), resume=str(tmp_path / "nothing"))


def test_a_run_lies_on_an_object_store_too(workspace: Any, tmp_path: Path) -> None:
    out = f"memory://{tmp_path.name}/runs"
    options = tree(workspace, tmp_path, validation={"rows": 0}) | {"out": out}
    first = train(parse(options | {"steps": 2}, folder=tmp_path))
    longer = train(parse(options | {"steps": 3}, folder=tmp_path), resume="auto")
    assert (longer.run, longer.folder, longer.steps_done) == (first.run, f"{out}/{first.run}", 1)
    told = [json.loads(line) for line in open_storage(longer.folder).read("metrics.jsonl").splitlines()]
    assert [line.get("step") for line in told] == [None, 1, 2, 3]
    assert set(checkpoint.open_checkpoint(longer.folder).workspaces.values()) == {workspace.uri}
