"""What processes that share some work tell one another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from vlmamba.common.processes.launch import Launch
from vlmamba.errors import TrainingError, VLMambaError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

WAIT = timedelta(hours=2)
"""Longer than one process alone works while the others wait (lengths of a large data set, export). A run that hangs is
ended much earlier, by its watch (`vlmamba.training.faults.Watch`)."""


class Group:
    """The processes that share some work, as one of them sees it; without a `launch`, the only one.

    What they tell one another lives on the CPU and travels over gloo, so it neither waits for a GPU nor mixes with the
    gradients on NCCL.

    Args:
        launch: The place of this process; it joins the others, unless it has done so already.
        device: Where it computes; "cpu" without one.
        wait: How long it waits for the others.

    Attributes:
        rank: Number of this process, from 0.
        world_size: Number of processes.
        handle: torch's group for these messages; None: the one of all processes.
    """

    def __init__(
        self, launch: Launch | None = None, *, device: torch.device | None = None, wait: timedelta = WAIT
    ) -> None:
        self.launch = launch or Launch()
        self.rank, self.world_size = self.launch.rank, self.launch.world_size
        self.handle: Any = None
        self._joined = launch is not None
        if launch is not None:
            self._join(device, wait)

    def _join(self, device: torch.device | None, wait: timedelta) -> None:
        import torch
        import torch.distributed as dist

        on_gpu = device is not None and device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        if dist.is_initialized():
            return
        os.environ.setdefault("MASTER_ADDR", self.launch.master_addr)
        os.environ.setdefault("MASTER_PORT", str(self.launch.master_port))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            rank=self.rank,
            world_size=self.world_size,
            timeout=wait,
            device_id=device if on_gpu else None,
        )

    @property
    def is_main(self) -> bool:
        """Whether this process writes files, logs and progress, and decides for all."""
        return self.rank == 0

    def apart(self) -> Group:
        """The same processes with messages of their own, so that a thread may use them."""
        import torch.distributed as dist

        other = Group()
        other.launch, other.rank, other.world_size = self.launch, self.rank, self.world_size
        if self._joined:
            other.handle = dist.new_group(backend="gloo", timeout=WAIT)
        return other

    def share(self, items: Sequence[T]) -> list[T]:
        """The items of this process: every one belongs to exactly one."""
        return list(items[self.rank :: self.world_size])

    def on_main(self, function: Callable[[], T]) -> T:
        """Call a function in the first process and return its value in all.

        Raises:
            VLMambaError: In the others, when the function raised: an error of the same class with the first line of
                its message, or a TrainingError where it is none of ours. The first raises that itself.
        """
        if self.world_size == 1:
            return function()
        import torch.distributed as dist

        outcome: tuple[T | None, type[VLMambaError], str | None] = (None, TrainingError, None)
        failure: Exception | None = None
        if self.is_main:
            try:
                outcome = (function(), TrainingError, None)
            except Exception as error:  # noqa: BLE001 - whatever it is, the others must not wait for ever
                failure = error
                kind = type(error) if isinstance(error, VLMambaError) else TrainingError
                outcome = (None, kind, (str(error) or type(error).__name__).splitlines()[0])
        shared = [outcome]
        dist.broadcast_object_list(shared, src=0, group=self.handle)
        if failure is not None:
            raise failure
        value, kind, message = shared[0]
        if message is not None:
            raise kind(f"stopped, because rank 0 reported: {message}")
        return value  # type: ignore[return-value]

    @contextmanager
    def main_first(self, *, of_each_host: bool = False) -> Iterator[None]:
        """The first process (or that of each host) does it, then the others, which find what it left on the disk."""
        first = self.launch.local_rank == 0 if of_each_host else self.is_main
        if not first:
            self.barrier()
        yield
        if first:
            self.barrier()

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in all of them."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.handle)
        return values

    def sum_counts(self, *counts: int) -> tuple[int, ...]:
        """Integers summed over all processes."""
        return tuple(map(int, self._sum(counts, "int64")))

    def sum_floats(self, *values: float) -> tuple[float, ...]:
        """Numbers summed over all processes, in float64."""
        return tuple(self._sum(values, "float64"))

    def _sum(self, values: Sequence[float], dtype: str) -> Sequence[float]:
        if self.world_size == 1:
            return values
        import torch
        import torch.distributed as dist

        total = torch.tensor(values, dtype=getattr(torch, dtype))
        dist.all_reduce(total, group=self.handle)
        summed: list[float] = total.tolist()
        return summed

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process, the same answer in all of them."""
        return self.sum_counts(int(flag))[0] > 0

    def barrier(self) -> None:
        """Wait for all processes."""
        self.sum_counts(0)

    def close(self) -> None:
        """Leave the others, when the work ended well."""
        if self._joined:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()
