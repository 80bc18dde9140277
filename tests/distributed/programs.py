"""What the processes of a test do; loaded by path in each of them."""

from __future__ import annotations

import logging
from typing import Any

import torch

from vlmamba.training import loop
from vlmamba.training.config import TrainConfig
from vlmamba.training.run import run


def train(
    values: dict[str, Any], *, resume: bool = False, die_after: int | None = None, deaths: str = "raise"
) -> dict[str, Any]:
    """A run; returns what it came to in this process."""
    logging.basicConfig(level=logging.INFO)
    seen: dict[str, Any] = {"losses": [], "norms": [], "images": []}
    real = loop.optimizer_step

    def recorded(training: Any, step: Any) -> tuple[float, float]:
        seen["images"].append(["pixel_values" in batch for batch in step.micro_batches])
        loss, norm = real(training, step)
        seen["losses"].append(loss)
        seen["norms"].append(norm)
        return loss, norm

    loop.optimizer_step = recorded
    result = run(TrainConfig.from_dict(values), resume=resume)
    return {**seen, "outcome": result.outcome, "step": result.step}


def gradients(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The whole gradients of the first step, after clipping has been left out."""
    from torch.distributed.tensor import DTensor

    from vlmamba.training.parts import trainable_parameters

    found: dict[str, torch.Tensor] = {}

    class Enough(Exception):
        pass

    def caught(training: Any, step: Any) -> tuple[float, float]:
        (supervised,) = training.parallel.sum_counts(step.num_supervised)
        loss = loop.accumulate_gradients(training, step, supervised).sum()
        training.parallel.clip_grad_norm(trainable_parameters(training.model).values(), None)
        for name, parameter in trainable_parameters(training.model).items():
            grad = parameter.grad
            if grad is not None:
                whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
                found[name.removeprefix("module.")] = whole.clone()
        found["loss"] = torch.tensor(training.parallel.sum_floats(float(loss)))
        raise Enough

    loop.optimizer_step = caught
    try:
        run(TrainConfig.from_dict(values))
    except Enough:
        return found
    raise AssertionError("no step was taken")
