"""Which tiling a Triton kernel runs with, and on what.

Tilings change the order of some sums, so a choice by stopwatch may differ between processes. With
`torch.use_deterministic_algorithms(True)` nothing is measured and the first candidate is taken: then results
are the same bits in every process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

PROGRAMS_FOR_EACH_PROCESSOR = 8
"""How many programs (one warp each, about 255 registers a lane) a multiprocessor holds at once."""

LARGEST_TILE = 2048
"""Most state elements of a tile (T N C); more do not fit into a warp's registers."""

_best: dict[tuple[Any, ...], Tiling] = {}


@dataclass(frozen=True, slots=True)
class Tiling:
    """Channels of a tile, time steps of a tile, and warps of a program."""

    block: int
    steps: int
    warps: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """Launch options that go with every tiling."""
        return {"num_warps": self.warps, "enable_fp_fusion": True}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """A context in which kernels are launched where the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def programs_wanted(device: torch.device) -> int:
    """How many programs keep a device busy; calls with fewer are split along time."""
    if device.type != "cuda":
        return PROGRAMS_FOR_EACH_PROCESSOR
    return PROGRAMS_FOR_EACH_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def tune(
    key: tuple[Any, ...],
    candidates: tuple[Tiling, ...],
    size: int,
    device: torch.device,
    run: Callable[[Tiling], Any],
) -> Tiling:
    """The fastest candidate for calls of one kind, measured at the first such call.

    Args:
        key: What calls of this kind have in common.
        candidates: Tilings, the one to take without measuring first.
        size: N, a power of two; candidates too large for it are left out.
        device: Where the call runs.
        run: Runs the call with a tiling.
    """
    fitting = tuple(t for t in candidates if size * t.block * t.steps <= LARGEST_TILE) or (Tiling(16, 1),)
    if len(fitting) == 1 or device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return fitting[0]
    key = (*key, device.index)
    if key not in _best:
        if torch.cuda.is_current_stream_capturing():
            return fitting[0]
        _best[key] = min(fitting, key=lambda tiling: _time(run, tiling))
    return _best[key]


def _time(run: Callable[[Tiling], Any], tiling: Tiling, repeats: int = 3) -> float:
    """Milliseconds of the fastest of some runs after one that compiles."""
    run(tiling)
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(tiling)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return min(times)
