"""The place of parallelism: everything in training that depends on how many processes work together.

The loop, the checkpoint and the loss talk to a `Parallel` and to nothing else; model code knows nothing of it. One
strategy a file, registered by name here.
"""

from __future__ import annotations

import os

from vlmamba.common.processes import pick_device, read_launch
from vlmamba.errors import ConfigError
from vlmamba.registry import Registry
from vlmamba.training.config import TrainConfig
from vlmamba.training.parallel.base import Parallel

__all__ = ["STRATEGIES", "Parallel", "make_parallel"]

STRATEGIES: Registry[type[Parallel]] = Registry("parallel strategy")
STRATEGIES.add("single", Parallel)
STRATEGIES.add("ddp", "vlmamba.training.parallel.ddp:DDP")
STRATEGIES.add("fsdp2", "vlmamba.training.parallel.fsdp2:FSDP2")
STRATEGIES.add("zero2", "vlmamba.training.parallel.zero:ZeRO2")
STRATEGIES.add("zero3", "vlmamba.training.parallel.zero:ZeRO3")


def make_parallel(strategy: str, device: str, config: TrainConfig | None = None) -> Parallel:
    """Start the strategy of that name.

    Args:
        strategy: A registered name, or "auto": "single" for one process, "fsdp2" for several.
        device: See `vlmamba.common.processes.pick_device`.
        config: The run; only the single process does without.

    Raises:
        ConfigError: The name or the device is unknown, or the launcher started more processes than it can
            use.
    """
    if strategy == "single":
        started = os.environ.get("WORLD_SIZE", "1")
        number = started if started != "1" else str(read_launch().world_size)
        if number != "1":
            others = ", ".join(n for n in STRATEGIES.names() if n != "single")
            raise ConfigError(
                f"the launcher started {number} processes (WORLD_SIZE), but the parallel strategy 'single' uses 1. "
                f"Start one process, or choose another strategy with --parallel: {others}."
            )
    launch = read_launch()
    if strategy == "auto":
        strategy = "single" if launch.world_size == 1 else "fsdp2"
    start = STRATEGIES.get(strategy)
    if strategy == "single":
        return Parallel(pick_device(device))
    if config is None:
        raise ConfigError(f"parallel strategy {strategy!r} needs the settings of the run.")
    return start(pick_device(device, launch.local_rank), launch, config)
