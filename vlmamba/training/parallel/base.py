"""What training asks of a parallel strategy, and the single process that answers trivially."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

T = TypeVar("T")


class Channel:
    """Plain Python values between the processes of a run; here for one process.

    Attributes:
        rank: Number of this process, from 0.
        world_size: Number of processes.
    """

    rank = 0
    world_size = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    def on_main(self, function: Callable[[], T]) -> T:
        """Call a function in the first process and return its value, or raise its error, in all."""
        return function()

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in all of them."""
        return [value]

    def barrier(self) -> None:
        """Wait for all processes."""


class Parallel(ABC):
    """How the processes of one run work together.

    Attributes:
        rank: Number of this process, from 0.
        world_size: Number of processes.
        device: Where this process computes.
        layout: How a checkpoint is written: "whole" by the first process, or in "shards" by all.
        replicated: Whether every process holds all of the model after a step, as one process does.
    """

    rank: int
    world_size: int
    device: torch.device
    layout: Literal["whole", "shards"] = "whole"
    replicated: bool = True

    @property
    def is_main(self) -> bool:
        """Whether this process writes files, logs and progress."""
        return self.rank == 0

    @property
    @abstractmethod
    def loss_scale(self) -> float:
        """What a loss is multiplied with before backward, so that gradients end up summed over the processes.

        Strategies that average gradients return their world size; those that sum return 1.
        """

    @abstractmethod
    def wrap(self, model: nn.Module) -> nn.Module:
        """The model to call in the forward pass, prepared once trainable parts and precision are set."""

    def build_optimizer(
        self, model: nn.Module, build: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> torch.optim.Optimizer:
        """The optimizer over the parameters as `wrap` left them."""
        return build(model)

    @abstractmethod
    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Surrounds one micro-step; gradients need to be exchanged in the last one only."""

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

    @abstractmethod
    def sum_counts(self, *counts: int) -> tuple[int, ...]:
        """Integers summed over all processes."""

    @abstractmethod
    def sum_floats(self, *values: float) -> tuple[float, ...]:
        """Numbers summed over all processes."""

    @abstractmethod
    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process, the same answer in all of them."""

    @abstractmethod
    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> torch.Tensor:
        """Scale gradients down to a global norm (None: leave them) and return the norm they had."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait for all processes."""

    def channel(self) -> Channel:
        """A new channel, apart from the training's own messages, so that a thread may use it."""
        return Channel()

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
        from vlmamba.training.sharded import check_names

        wanted = self.trained_tensors(model)
        check_names(where, wanted, {n: t.shape for n, t in tensors.items()})
        copy_into(wanted, tensors)
        load_named_state(optimizer, state)

    def close(self) -> None:  # noqa: B027 - one process has nothing to leave
        """The run ended well: leave the group of processes."""


class SingleProcess(Parallel):
    """One process on one device."""

    rank = 0
    world_size = 1
    loss_scale = 1.0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model itself."""
        return model

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Nothing to do."""
        return contextlib.nullcontext()

    def sum_counts(self, *counts: int) -> tuple[int, ...]:
        """The counts."""
        return counts

    def sum_floats(self, *values: float) -> tuple[float, ...]:
        """The values."""
        return values

    def any(self, flag: bool) -> bool:
        """The flag."""
        return flag

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> torch.Tensor:
        """`torch.nn.utils.clip_grad_norm_`, or the norm alone."""
        return nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm)

    def barrier(self) -> None:
        """Nothing to wait for."""
