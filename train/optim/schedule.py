"""Computes the learning rate of a step: a pure function, with the names and the shapes of DeepSpeed's schedulers."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Rises from `start` to `peak`, then stays, falls linearly to 0, or falls by half a cosine to `end`.

    As in deepspeed/runtime/lr_schedules.py.

    warmup_steps  steps of the warm-up
    total_steps   the step at which the decay has ended; None is the run's last
    warmup        `log` rises with the logarithm of the step, `linear` with the step
    """

    peak: float
    start: float = 0.0
    end: float = 0.0
    warmup_steps: int = 0
    total_steps: int | None = None
    warmup: Literal["log", "linear"] = "log"
    decay: Literal["constant", "linear", "cosine"] = "constant"

    def rate(self, step: int, steps: int) -> float:
        """Returns the learning rate of the update after `step` updates, in a run of `steps`."""
        if step < self.warmup_steps:
            risen = step / self.warmup_steps
            if self.warmup == "log" and self.warmup_steps > 1:
                risen = math.log(step + 1) / math.log(self.warmup_steps)
            return self.start + (self.peak - self.start) * risen
        if self.decay == "constant":
            return self.peak
        decay_steps = (self.total_steps or steps) - self.warmup_steps
        gone = min(1.0, (step - self.warmup_steps) / max(1, decay_steps))
        if self.decay == "linear":
            return self.peak * (1 - gone)
        return self.end + (self.peak - self.end) * (1 + math.cos(math.pi * gone)) / 2
