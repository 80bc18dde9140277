# mypy: allow-untyped-defs, allow-untyped-decorators
"""A kernel that shows whether Triton works on this machine."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vlmamba.ssm.spec import Verdict


@triton.jit
def _add_one(x, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(x + at, tl.load(x + at) + 1.0)


def add_one() -> Verdict:
    """Add one to a few zeros on the current CUDA device: True, or what is wrong with the result."""
    x = torch.zeros(32, device="cuda")
    _add_one[(1,)](x, SIZE=32, num_warps=1)
    return True if bool((x == 1).all()) else f"a small Triton kernel computes {x[0].item()} for 0 + 1"
