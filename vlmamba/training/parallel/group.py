"""What strategies of several processes share: the process group, sums over it, and a channel for plain values.

Numbers that the loop exchanges live on the CPU and travel over gloo, so they neither wait for the GPU nor mix with
the gradients on NCCL.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from vlmamba.errors import TrainingError, VLMambaError
from vlmamba.training.parallel.base import Channel, Parallel
from vlmamba.training.parallel.launch import Launch

T = TypeVar("T")

WAIT = timedelta(hours=2)
"""Longer than one process alone works while the others wait (lengths of a large data set, export). A run that hangs is
ended much earlier, by its watch (`vlmamba.training.faults.Watch`)."""


class GroupChannel(Channel):
    """Plain values over a process group of its own."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def on_main(self, function: Callable[[], T]) -> T:
        """Call a function in the first process and return its value, or raise its error, in all.

        Raises:
            TrainingError: In all but the first process, when the function raised; the first raises that itself.
        """
        result: tuple[T | None, str | None] = (None, None)
        error: BaseException | None = None
        if self.is_main:
            try:
                result = (function(), None)
            except (VLMambaError, OSError, RuntimeError) as caught:
                error = caught
                result = (None, str(caught).splitlines()[0] if str(caught) else type(caught).__name__)
        shared = [result]
        dist.broadcast_object_list(shared, src=0, group=self.group)
        if error is not None:
            raise error
        value, message = shared[0]
        if message is not None:
            raise TrainingError(f"stopped, because rank 0 reported: {message}")
        return value  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in all of them."""
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait for all processes."""
        dist.all_reduce(torch.zeros(1), group=self.group)


class GroupParallel(Parallel):
    """Base of the strategies of several processes.

    Args:
        device: Where this process computes.
        launch: Its place among the processes.
    """

    def __init__(self, device: torch.device, launch: Launch) -> None:
        self.device, self.launch = device, launch
        self.rank, self.world_size = launch.rank, launch.world_size
        self.start_group()

    @property
    def loss_scale(self) -> float:
        """Gradients are averaged over the processes."""
        return float(self.world_size)

    def start_group(self) -> None:
        """Join the process group, unless this process is in one already."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if dist.is_initialized():
            return
        os.environ.setdefault("MASTER_ADDR", self.launch.master_addr)
        os.environ.setdefault("MASTER_PORT", str(self.launch.master_port))
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            rank=self.rank,
            world_size=self.world_size,
            timeout=WAIT,
            device_id=self.device if self.device.type == "cuda" else None,
        )

    def sum_counts(self, *counts: int) -> tuple[int, ...]:
        """Integers summed over all processes."""
        total = torch.tensor(counts, dtype=torch.int64)
        dist.all_reduce(total)
        return tuple(total.tolist())

    def sum_floats(self, *values: float) -> tuple[float, ...]:
        """Numbers summed over all processes."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return tuple(total.tolist())

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self.sum_counts(int(flag))[0] > 0

    def barrier(self) -> None:
        """Wait for all processes."""
        dist.all_reduce(torch.zeros(1))

    def channel(self) -> Channel:
        """A channel over a gloo group of its own."""
        group = dist.new_group(backend="gloo", timeout=WAIT)
        assert isinstance(group, dist.ProcessGroup)
        return GroupChannel(group)

    def close(self) -> None:
        """Leave the group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @abstractmethod
    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model to call in the forward pass."""
