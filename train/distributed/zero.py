"""ZeRO: how parameters, gradients and optimizer states are divided among processes."""

from typing import TypeVar

from torch import nn

from manifests.errors import ConfigError

AnyModule = TypeVar("AnyModule", bound=nn.Module)

# What `shard` can do.
STAGES = (0,)


def stage_problem(stage: int) -> str | None:
    """Why a stage cannot be had, None where it can."""
    if stage in STAGES:
        return None
    return f"is {stage}; one process holds the whole model, which is stage 0: set it to 0 or leave it out"


def shard(model: AnyModule, stage: int) -> AnyModule:
    """The model divided as the stage says. Raises ConfigError for a stage that cannot be had."""
    problem = stage_problem(stage)
    if problem is not None:
        raise ConfigError(f"deepspeed.zero_optimization.stage {problem}")
    return model
