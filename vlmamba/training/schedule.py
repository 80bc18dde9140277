"""Learning rate over the run, as a pure function of the step: nothing to save, nothing to get wrong on
resume.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from vlmamba.errors import ConfigError
from vlmamba.registry import Registry
from vlmamba.training.config import ScheduleConfig

# From progress after warm-up, in [0, 1), to a factor in (0, 1].
CURVES: Registry[Callable[[float], float]] = Registry("schedule")
CURVES.add("cosine", lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)))
CURVES.add("linear", lambda progress: 1.0 - progress)
CURVES.add("constant", lambda progress: 1.0)


class Schedule:
    """Factor on the peak learning rate for each optimizer step, counted from 0.

    Warm-up of W steps: ``(step + 1) / (W + 1)``, so that the first step is not wasted on a rate of zero and
    step W is the first at the peak. Then the curve runs from 1 to ``min_lr_ratio``, which it would reach at
    ``total_steps``.

    Args:
        config: Curve, warm-up and floor.
        total_steps: Optimizer steps of the whole run.

    Raises:
        ConfigError: The warm-up is longer than the run.
    """

    def __init__(self, config: ScheduleConfig, total_steps: int) -> None:
        self.total_steps = total_steps
        self.curve = CURVES.get(config.name)
        self.floor = config.min_lr_ratio
        if config.warmup_steps is not None:
            self.warmup_steps = config.warmup_steps
        else:
            self.warmup_steps = math.ceil(config.warmup_ratio * total_steps)
        if self.warmup_steps > total_steps:
            raise ConfigError(
                f"schedule: {self.warmup_steps} warm-up steps are more than the run's {total_steps} steps. "
                "Lower --schedule.warmup_steps or train longer."
            )

    def factor(self, step: int) -> float:
        """The factor for a step."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.floor + (1.0 - self.floor) * self.curve(min(progress, 1.0))
