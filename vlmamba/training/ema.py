"""A running mean of the weights, in fp32: ``mean <- decay * mean + (1 - decay) * weights`` after each step.

It is kept with the optimizer's state of each parameter, so it is cut, saved and resumed like the moments are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlmamba.errors import CheckpointError

KEY = "ema"


def track_mean(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Keep the mean of every parameter that the optimizer updates; it begins with the weights after a first step."""

    def update(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    state = optimizer.state.get(parameter)
                    if not state:  # it had no gradient
                        continue
                    if KEY in state:
                        state[KEY].lerp_(parameter.detach(), 1.0 - decay)
                    else:
                        state[KEY] = parameter.detach().clone()

    optimizer.register_step_post_hook(update)


def load_means(model: nn.Module, moments: dict[str, dict[str, Any]]) -> None:
    """Put the means of a checkpoint in place of the weights.

    Raises:
        CheckpointError: It has none.
    """
    means = {name: values[KEY] for name, values in moments.items() if KEY in values}
    if not means:
        raise CheckpointError("the checkpoint has no running mean of the weights (ema was off).")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, mean in means.items():
            parameters[name].copy_(mean)
