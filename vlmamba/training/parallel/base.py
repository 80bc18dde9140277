"""What training asks of a parallel strategy, and how one process answers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vlmamba.common.processes import Group, Launch


class Parallel(Group):
    """How the processes of one run work together; by itself, one process that holds everything.

    Args:
        device: Where this process computes.
        launch: Its place among the processes of a strategy of several.
        config: The run (`vlmamba.training.config.TrainConfig`), where the strategy has settings.

    Attributes:
        device: Where this process computes.
        layout: How a checkpoint is written: "whole" by the first process, or in "shards" by all.
        replicated: Whether every process holds all of the model after a step, as one process does.
    """

    layout: Literal["whole", "shards"] = "whole"
    replicated: bool = True

    def __init__(self, device: torch.device, launch: Launch | None = None, config: Any = None) -> None:
        self.device, self.config = device, config
        super().__init__(launch, device=device)

    @property
    def loss_scale(self) -> float:
        """What a loss is multiplied with before backward, so that gradients end up summed over the processes.

        Strategies average them.
        """
        return float(self.world_size)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model to call in the forward pass, prepared once trainable parts and precision are set."""
        return model

    def build_optimizer(
        self, model: nn.Module, build: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> torch.optim.Optimizer:
        """The optimizer over the parameters as `wrap` left them."""
        return build(model)

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Surrounds one micro-step; gradients need to be exchanged in the last one only."""
        return contextlib.nullcontext()

    def gathered(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within it every process holds all weights and runs the model, as given to `wrap`, without messages."""
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a micro-step's share of the loss."""
        (loss * self.loss_scale).backward()

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
        max_norm: float | None,
        *,
        finite: bool,
    ) -> tuple[float, bool]:
        """Clip, take the optimizer step unless loss (`finite`) or gradient is not finite, and forget the gradients.

        Returns:
            The gradient norm before clipping, and whether the step was taken.
        """
        norm = float(self.clip_grad_norm(parameters, max_norm).item())
        taken = finite and math.isfinite(norm)
        if taken:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm, taken

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> torch.Tensor:
        """Scale gradients down to a global norm (None: leave them) and return the norm they had."""
        return nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm)

    def named_state(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
        """The optimizer's state by parameter name; whole tensors, or shards under the layout "shards"."""
        from vlmamba.training.optim import named_state

        return named_state(optimizer)

    def trained_tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """What trains, in fp32, by name; whole tensors, or shards under the layout "shards"."""
        from vlmamba.training.checkpoint import trained_tensors

        return trained_tensors(model)

    def load(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        tensors: dict[str, torch.Tensor],
        state: dict[str, dict[str, Any]],
        *,
        where: Path,
    ) -> None:
        """Put whole tensors of a checkpoint, and optimizer state by name, where this strategy keeps them.

        Raises:
            CheckpointError: They are not those that train.
        """
        from vlmamba.training.checkpoint import copy_into
        from vlmamba.training.optim import load_named_state

        copy_into(where, self.trained_tensors(model), tensors)
        load_named_state(optimizer, state)
