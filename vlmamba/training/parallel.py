"""The place of parallelism: everything in training that depends on how many processes work together.

The loop, the checkpoint and the loss talk to a `Parallel` and to nothing else; model code knows nothing of
it. This file holds the interface and the single process; every other strategy is one more class, registered
by name.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import nn

from vlmamba.errors import ConfigError
from vlmamba.registry import Registry


class Parallel(ABC):
    """How the processes of one run work together.

    Attributes:
        rank: Number of this process, from 0.
        world_size: Number of processes.
        device: Where this process computes.
    """

    rank: int
    world_size: int
    device: torch.device

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

    @abstractmethod
    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Surrounds one micro-step; gradients need to be exchanged in the last one only."""

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


STRATEGIES: Registry[Callable[[torch.device], Parallel]] = Registry("parallel strategy")
STRATEGIES.add("single", SingleProcess)


def make_parallel(strategy: str, device: str) -> Parallel:
    """Start the strategy of that name.

    Raises:
        ConfigError: The name or the device is unknown, or the launcher started more processes than it can
            use.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    parallel = STRATEGIES.get(strategy)(pick_device(device))
    if world_size != parallel.world_size:
        raise ConfigError(
            f"the launcher started {world_size} processes (WORLD_SIZE), but the parallel strategy "
            f"{strategy!r} uses "
            f"{parallel.world_size}. Start one process, or choose another strategy: "
            f"{', '.join(STRATEGIES.names())}."
        )
    return parallel


def pick_device(name: str) -> torch.device:
    """``"auto"`` is the GPU where there is one; other names are torch's.

    Raises:
        ConfigError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"device: {name!r} is not a device of torch; use auto, cpu, cuda or cuda:1."
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {name!r} asked for, but torch sees no GPU here. Use --device cpu.")
    return device
