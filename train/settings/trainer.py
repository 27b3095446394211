"""Reads the trainer file: YAML for the run, DeepSpeed's JSON for the engine. A mapping becomes frozen values.

All mistakes are found at once, each with its place and, for an unknown key, the nearest known one.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import to_jsonable_python

from manifests import mistakes
from manifests.errors import ConfigError
from manifests.mistakes import KeyPath
from manifests.store.uris import absolute
from train.data.mask import Masking, Strategy
from train.data.vocabulary import MOST_TOKENS
from train.model.transformer import ModelConfig
from train.settings import deepspeed
from train.settings.deepspeed import DeepSpeed, EngineOptions, Options

_SNAPSHOT = "WORKSPACE#NAME, as `modmill snapshot WORKSPACE NAME` made it"


class SourceOptions(Options):
    """Holds an entry of the mixture. The path in `snapshot` is absolute; `corpora` None means all of its corpora."""

    snapshot: str = Field(description=_SNAPSHOT)
    corpora: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    weight: PositiveFloat = 1.0

    @field_validator("snapshot")
    @classmethod
    def _absolute(cls, uri: str, info: ValidationInfo) -> str:
        workspace, mark, name = uri.rpartition("#")
        if not (workspace and mark and name):
            raise ValueError(f"is {uri!r}, expected {_SNAPSHOT}")
        return f"{absolute(workspace, info.context or Path.cwd())}#{name}"


class ValidationOptions(Options):
    """Holds how often, and on how many held-out rows, the loss is measured; also after the last step. 0 rows: never."""

    every: PositiveInt = 500
    rows: NonNegativeInt = 256


class CheckpointOptions(Options):
    """Holds how often a checkpoint is written (also after the last step), and how many of the newest are kept."""

    every: PositiveInt = 500
    keep: PositiveInt = 2


class TrainConfig(Options):
    """Holds a trainer file.

    name      a run's name begins with it
    out       where run folders go; None is `runs` in the first snapshot's workspace
    steps     updates in all
    sequence_tokens  sequences are cut to windows of this many tokens
    loss_weights     by modality; 1 for those that are not named
    log_every        steps between two lines of metrics
    threads   CPU threads of torch; None is torch's own choice. On a CPU another number of threads gives other last bits
    device    `auto` is a GPU if there is one
    workers   threads of the loader that work ahead
    """

    name: str = Field(
        default="train",
        pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$",
        description="lower-case letters, digits, - and _, at most 64",
    )
    steps: PositiveInt = Field(description="the number of updates")
    mixture: tuple[SourceOptions, ...] = Field(
        min_length=1, description="a list of {snapshot: WORKSPACE#NAME, weight: 1}"
    )
    deepspeed: DeepSpeed
    out: str | None = Field(default=None, min_length=1)
    seed: NonNegativeInt = 0
    model: ModelConfig = ModelConfig()
    sequence_tokens: PositiveInt = MOST_TOKENS
    masking: Masking = Masking()
    loss_weights: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    validation: ValidationOptions = ValidationOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    log_every: PositiveInt = 10
    threads: PositiveInt | None = None
    device: str = Field(default="auto", min_length=1)
    workers: NonNegativeInt = 1

    @field_validator("out")
    @classmethod
    def _absolute_out(cls, out: str | None, info: ValidationInfo) -> str | None:
        return absolute(out, info.context or Path.cwd()) if out else None

    @field_validator("model")
    @classmethod
    def _divides_into_heads(cls, model: ModelConfig) -> ModelConfig:
        try:
            _ = model.width
        except ConfigError as error:
            raise ValueError(f"cannot be: {error}") from error
        return model

    @cached_property
    def engine(self) -> EngineOptions:
        """Holds what a step does with DeepSpeed's options."""
        return self.deepspeed.options()

    @property
    def notes(self) -> tuple[str, ...]:
        """Says what stands in the file without effect."""
        found = tuple(self.deepspeed.without_effect("deepspeed."))
        schedule = self.engine.schedule
        end = schedule.total_steps or self.steps
        if schedule.decay == "constant" or end >= schedule.warmup_steps:
            return found
        short = f"is {schedule.warmup_steps}, over all {end} steps: the rate stays under its peak"
        return (f"deepspeed.scheduler.params.warmup_num_steps {short}", *found)

    def document(self) -> dict[str, Any]:
        """Returns all of it as plain JSON values. A run's identity is made of them."""
        own = self.model_dump(mode="json", exclude={"deepspeed"})
        # Runs that began before there was a choice do not have it.
        if self.masking.overlong is None:
            del own["masking"]["overlong"]
        return {**own, "deepspeed": to_jsonable_python(asdict(self.engine))}


_SECTIONS: mistakes.Sections = {
    (): TrainConfig,
    ("mixture", "*"): SourceOptions,
    ("model",): ModelConfig,
    ("masking",): Masking,
    ("masking", "strategies", "*"): Strategy,
    ("validation",): ValidationOptions,
    ("checkpoint",): CheckpointOptions,
    **{("deepspeed", *path): section for path, section in deepspeed.SECTIONS.items()},
}


def parse(
    tree: Mapping[str, Any], *, folder: Path, where: Callable[[KeyPath], str] = lambda path: "trainer file"
) -> TrainConfig:
    """Returns the configuration in a mapping. Relative paths start at `folder`, `where` names the place of a key path.

    A key that is null has its default. Raises ConfigError with a line for each mistake.
    """
    engine = tree.get("deepspeed") or {}
    file = absolute(engine, folder) if isinstance(engine, str) else None
    if file is not None:
        try:
            engine = json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            place = where(("deepspeed",))
            raise ConfigError(f"{place}: deepspeed names {file}, which cannot be read as JSON: {error}") from error

    def place_of(path: KeyPath) -> str:
        return file if file is not None and path[:1] == ("deepspeed",) else where(path)

    # As JSON, since only there pydantic's strict mode takes lists for tuples and mappings for dataclasses.
    text = json.dumps(_without_nulls({**tree, "deepspeed": engine}), default=str)
    try:
        return TrainConfig.model_validate_json(text, context=folder)
    except ValidationError as error:
        raise ConfigError("\n".join(mistakes.explain(error.errors(include_url=False), _SECTIONS, place_of))) from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _without_nulls(below) for name, below in value.items() if below is not None}
    return [_without_nulls(below) for below in value] if isinstance(value, list) else value
