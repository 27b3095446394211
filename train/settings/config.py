"""The trainer file: YAML for the run, DeepSpeed's JSON for the engine. It is given as a mapping and becomes frozen values.

All mistakes are found at once, each with its place and, for an unknown key, the nearest known one.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from manifests.errors import ConfigError
from train.data.mask import OTHERS, Masking, Strategy
from train.data.vocabulary import MOST_TOKENS
from train.model.transformer import ModelConfig
from train.settings import deepspeed as deepspeed_options
from train.settings.deepspeed import EngineOptions
from train.settings.section import KeyPath, Mistakes, Section, shown

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """An entry of the mixture. `snapshot` is WORKSPACE#NAME, its path absolute; `corpora` None is all of its corpora."""

    snapshot: str
    corpora: tuple[str, ...] | None = None
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """The loss on so many held-out rows, every so many steps and after the last. 0 rows: no validation."""

    every: int = 500
    rows: int = 256


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """A checkpoint every so many steps and after the last; the newest `keep` stay."""

    every: int = 500
    keep: int = 2


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A trainer file.

    name      a run's name begins with it
    out       where run folders go; None is `runs` in the first snapshot's workspace
    steps     updates in all
    sequence_tokens  sequences are cut to windows of so many tokens
    loss_weights     by modality; 1 for those that are not named
    log_every        steps between two lines of metrics
    threads   CPU threads of torch; None is torch's own choice. On a CPU other numbers of threads give other last bits
    device    `auto` is a GPU where there is one
    workers   threads of the loader that work ahead
    notes     what the file says without effect
    """

    name: str
    steps: int
    mixture: tuple[SourceOptions, ...]
    deepspeed: EngineOptions
    out: str | None = None
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    sequence_tokens: int = MOST_TOKENS
    masking: Masking = field(default_factory=Masking)
    loss_weights: Mapping[str, float] = field(default_factory=dict)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    log_every: int = 10
    threads: int | None = None
    device: str = "auto"
    workers: int = 1
    notes: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        document = asdict(self)
        del document["notes"]
        return json.loads(json.dumps(document))


def parse(
    tree: Mapping[str, Any], *, folder: Path, where: Callable[[KeyPath], str] = lambda path: "trainer file"
) -> TrainConfig:
    """The configuration in a mapping; relative paths start at `folder`, `where` names the place of a key path.

    Raises ConfigError with a line a mistake.
    """
    mistakes = Mistakes(where)
    section = Section(tree, (), mistakes)
    steps = section.integer("steps", 1, least=1)
    if "steps" not in section:
        section.wrong("steps", "is missing; expected the number of updates")
    engine, notes = _engine(section, folder, steps, mistakes)
    config = TrainConfig(
        name=_name(section),
        out=_out(section, folder),
        seed=section.integer("seed", 0),
        steps=steps,
        mixture=_mixture(section, folder),
        model=_model(section.section("model")),
        sequence_tokens=section.integer("sequence_tokens", MOST_TOKENS, least=1),
        masking=_masking(section.section("masking")),
        loss_weights=section.numbers("loss_weights", {}),
        deepspeed=engine,
        validation=_validation(section.section("validation")),
        checkpoint=_checkpoint(section.section("checkpoint")),
        log_every=section.integer("log_every", 10, least=1),
        threads=section.optional_integer("threads", least=1),
        device=section.text("device", "auto"),
        workers=section.integer("workers", 1),
        notes=tuple(notes),
    )
    section.end()
    mistakes.check()
    return config


def _name(section: Section) -> str:
    name = section.text("name", "train")
    if not _NAME.fullmatch(name):
        section.wrong("name", f"is {name!r}, expected lower-case letters, digits, - and _, at most 64")
    return name


def _out(section: Section, folder: Path) -> str | None:
    out = section.text("out", "")
    return _absolute(out, folder) if out else None


def _mixture(section: Section, folder: Path) -> tuple[SourceOptions, ...]:
    found = []
    for entry in section.sections("mixture"):
        uri = entry.text("snapshot", "")
        if not uri:
            entry.wrong("snapshot", "is missing; expected WORKSPACE#NAME")
        workspace, mark, name = uri.rpartition("#")
        if uri and not (workspace and mark and name):
            entry.wrong(
                "snapshot", f"is {uri!r}, expected WORKSPACE#NAME, as `modmill snapshot WORKSPACE NAME` made it"
            )
        found.append(
            SourceOptions(
                snapshot=f"{_absolute(workspace, folder)}#{name}",
                corpora=_corpora(entry),
                weight=entry.number("weight", 1.0, over=0.0),
            )
        )
        entry.end()
    if not found:
        section.wrong("mixture", "is missing or empty; expected a list of {snapshot: WORKSPACE#NAME, weight: 1}")
    return tuple(found)


def _corpora(entry: Section) -> tuple[str, ...] | None:
    value = entry.raw("corpora")
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        entry.wrong("corpora", f"is {shown(value)}, expected a list of corpora")
        return None
    return tuple(value)


def _model(section: Section) -> ModelConfig:
    config = ModelConfig(
        depth=section.integer("depth", 12, least=1),
        dim=section.optional_integer("dim", least=1),
        heads=section.optional_integer("heads", least=1),
        encoder_depth=section.optional_integer("encoder_depth", least=1),
        decoder_depth=section.optional_integer("decoder_depth", least=1),
        mlp_ratio=section.number("mlp_ratio", 4.0, over=0.0),
    )
    section.end()
    try:
        _ = config.width
    except ConfigError as error:
        section.mistakes.add(section.path, f"cannot be: {error}")
    return config


def _masking(section: Section) -> Masking:
    known = Masking()
    strategies = [_strategy(one) for one in section.sections("strategies")]
    masking = Masking(
        inputs=section.pair("inputs", known.inputs, least=1),
        targets=section.pair("targets", known.targets, least=1),
        strategies=tuple(strategies) or known.strategies,
    )
    section.end()
    return masking


def _strategy(section: Section) -> Strategy:
    keep = section.text("keep", "random", choices=("random", "all", "binary"))
    strategy = Strategy(
        weight=section.number("weight", 1.0, over=0.0),
        inputs=section.numbers("inputs", {OTHERS: 1.0}),
        targets=section.numbers("targets", {OTHERS: 1.0}),
        keep=keep,  # type: ignore[arg-type] one of the choices
    )
    section.end()
    return strategy


def _validation(section: Section) -> ValidationOptions:
    options = ValidationOptions(
        every=section.integer("every", ValidationOptions.every, least=1),
        rows=section.integer("rows", ValidationOptions.rows),
    )
    section.end()
    return options


def _checkpoint(section: Section) -> CheckpointOptions:
    options = CheckpointOptions(
        every=section.integer("every", CheckpointOptions.every, least=1),
        keep=section.integer("keep", CheckpointOptions.keep, least=1),
    )
    section.end()
    return options


def _engine(section: Section, folder: Path, steps: int, mistakes: Mistakes) -> tuple[EngineOptions, Sequence[str]]:
    value = section.raw("deepspeed")
    if not isinstance(value, str):
        return deepspeed_options.read(section.section("deepspeed"), steps=steps)
    path = Path(_absolute(value, folder))
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        section.wrong("deepspeed", f"names {path}, which cannot be read as JSON: {error}")
        return EngineOptions(batch=1, micro_batch=1, accumulation=1), []
    inside = Mistakes(lambda _: str(path), mistakes.lines)
    return deepspeed_options.read(Section(tree, (), inside), steps=steps)


def _absolute(text: str, folder: Path) -> str:
    return text if "://" in text else os.path.abspath(os.path.join(folder, os.path.expanduser(text)))
