"""Several processes that share the questions of a task: who takes which, and what they tell one another.

Each process has the whole model. They meet only before the first question and after the last, over gloo.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from vlmamba.errors import VLMambaError

T = TypeVar("T")

WAIT = timedelta(days=7)
"""How long a process that is done waits for the others; a launcher ends all when one fails."""


class Ranks:
    """The place of this process among those that share the work; by itself, the only one.

    Attributes:
        rank: Number of this process, from 0.
        world_size: Number of processes.
    """

    rank = 0
    world_size = 1

    @property
    def is_main(self) -> bool:
        """Whether this process reads, merges and scores for all."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """The items of this process: every one belongs to exactly one."""
        return list(items[self.rank :: self.world_size])

    def on_main(self, function: Callable[[], T]) -> T:
        """Call a function in the first process and return its value, or raise its error, in all."""
        return function()

    def barrier(self) -> None:
        """Wait for all processes."""

    def close(self) -> None:
        """Leave the others."""


class RankGroup(Ranks):
    """One of several processes.

    Args:
        launch: Where it stands: has `rank`, `world_size`, `master_addr` and `master_port`
            (`vlmamba.training.parallel.launch.read_launch` gives it).
    """

    def __init__(self, launch: Any) -> None:
        import torch.distributed as dist

        self.rank, self.world_size = launch.rank, launch.world_size
        os.environ.setdefault("MASTER_ADDR", launch.master_addr)
        os.environ.setdefault("MASTER_PORT", str(launch.master_port))
        dist.init_process_group("gloo", rank=self.rank, world_size=self.world_size, timeout=WAIT)

    def on_main(self, function: Callable[[], T]) -> T:
        """See `Ranks.on_main`; processes other than the first raise an error of the same class."""
        import torch.distributed as dist

        outcome: tuple[T | None, Exception | None] = (None, None)
        if self.is_main:
            try:
                outcome = (function(), None)
            except (VLMambaError, OSError) as error:
                outcome = (None, error)
        shared = [outcome]
        dist.broadcast_object_list(shared, src=0)
        value, failure = shared[0]
        if failure is not None:
            raise failure
        return value  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait for all processes."""
        import torch.distributed as dist

        dist.barrier()

    def close(self) -> None:
        """Leave the group."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def connect(launch: Any) -> Ranks:
    """The process's place, from what its launcher told it."""
    return RankGroup(launch) if launch.world_size > 1 else Ranks()
