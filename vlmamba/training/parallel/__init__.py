"""The place of parallelism: everything in training that depends on how many processes work together.

The loop, the checkpoint and the loss talk to a `Parallel` and to nothing else; model code knows nothing of it. One
strategy a file, registered by name here.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from vlmamba.errors import ConfigError
from vlmamba.registry import Registry
from vlmamba.training.config import TrainConfig
from vlmamba.training.parallel.base import Channel, Parallel, SingleProcess
from vlmamba.training.parallel.launch import Launch, read_launch

__all__ = [
    "STRATEGIES",
    "Channel",
    "Launch",
    "Parallel",
    "SingleProcess",
    "make_parallel",
    "pick_device",
    "read_launch",
]

Strategy = Callable[[torch.device, Launch, TrainConfig], Parallel]


def _single(device: torch.device, launch: Launch, config: TrainConfig) -> Parallel:
    return SingleProcess(device)


def _ddp(device: torch.device, launch: Launch, config: TrainConfig) -> Parallel:
    from vlmamba.training.parallel.ddp import DDP

    return DDP(device, launch)


def _fsdp2(device: torch.device, launch: Launch, config: TrainConfig) -> Parallel:
    from vlmamba.training.parallel.fsdp2 import FSDP2

    return FSDP2(device, launch, config)


def _zero2(device: torch.device, launch: Launch, config: TrainConfig) -> Parallel:
    from vlmamba.training.parallel.zero import ZeRO

    return ZeRO(device, launch, config, stage=2)


def _zero3(device: torch.device, launch: Launch, config: TrainConfig) -> Parallel:
    from vlmamba.training.parallel.zero import ZeRO

    return ZeRO(device, launch, config, stage=3)


STRATEGIES: Registry[Strategy] = Registry("parallel strategy")
STRATEGIES.add("single", _single)
STRATEGIES.add("ddp", _ddp)
STRATEGIES.add("fsdp2", _fsdp2)
STRATEGIES.add("zero2", _zero2)
STRATEGIES.add("zero3", _zero3)


def make_parallel(strategy: str, device: str, config: TrainConfig | None = None) -> Parallel:
    """Start the strategy of that name.

    Args:
        strategy: A registered name, or "auto": "single" for one process, "fsdp2" for several.
        device: See `pick_device`.
        config: The run; only the single process does without.

    Raises:
        ConfigError: The name or the device is unknown, or the launcher started more processes than it can
            use.
    """
    started = os.environ.get("WORLD_SIZE", "1")
    if strategy == "single":
        if started != "1" or read_launch().world_size != 1:
            number = started if started != "1" else str(read_launch().world_size)
            others = ", ".join(n for n in STRATEGIES.names() if n != "single")
            raise ConfigError(
                f"the launcher started {number} processes (WORLD_SIZE), but the parallel strategy 'single' uses 1. "
                f"Start one process, or choose another strategy with --parallel: {others}."
            )
        return SingleProcess(pick_device(device))
    launch = read_launch()
    if strategy == "auto":
        strategy = "single" if launch.world_size == 1 else "fsdp2"
    start = STRATEGIES.get(strategy)
    if config is None:
        raise ConfigError(f"parallel strategy {strategy!r} needs the settings of the run.")
    return start(pick_device(device, launch.local_rank), launch, config)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """``"auto"`` is the GPU of this process where there is one; other names are torch's.

    Raises:
        ConfigError: There is no such device here.
    """
    if name == "auto":
        return _gpu(local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"device: {name!r} is not a device of torch; use auto, cpu, cuda or cuda:1."
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {name!r} asked for, but torch sees no GPU here. Use --device cpu.")
    return _gpu(local_rank) if device == torch.device("cuda") else device


def _gpu(local_rank: int) -> torch.device:
    count = torch.cuda.device_count()
    if count == 1:  # a launcher that shows each process its own GPU only
        return torch.device("cuda", 0)
    if local_rank >= count:
        raise ConfigError(
            f"process {local_rank} of this host has no GPU: torch sees {count}. Start at most {count} processes."
        )
    return torch.device("cuda", local_rank)
