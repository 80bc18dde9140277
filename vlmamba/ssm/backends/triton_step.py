# mypy: allow-untyped-defs, allow-untyped-decorators
"""One decode step as a Triton kernel: the state is read and written once.

Shape legend: B batch, D channels, N state size, G groups, C channels of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmamba.ssm.backends.triton_tiles import LOG2E, Inputs, Strides, load, sigmoid, softplus, store
from vlmamba.ssm.backends.triton_tuning import on_device, power_of_two
from vlmamba.ssm.spec import StepCall

BLOCK = 16
"""C: 320 programs for one token of a 2.8B model."""


@triton.jit
def update(
    x, strides, state, state_strides, y, width, groups, tiles, size,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Overwrite the state (B, D, N) and fill y (B, D)."""
    program = tl.program_id(0)
    group = program // tiles % groups
    batch = (program // (tiles * groups)).to(tl.int64)
    local = program % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = local < width
    channels = (group * width + local).to(tl.int64)
    n = tl.arange(0, N)
    kept = inside[:, None] & (n < size)[None, :]
    u = load(x.u + batch * strides.u[0] + channels * strides.u[1], inside)
    delta = load(x.dt + batch * strides.dt[0] + channels * strides.dt[1], inside)
    if x.bias is not None:
        delta += load(x.bias + channels, inside)
    if SOFTPLUS:
        delta = softplus(delta)
    A2 = load(x.A + channels[:, None] * strides.A[0] + n[None, :] * strides.A[1], kept) * LOG2E
    b = load(x.B + batch * strides.B[0] + group * strides.B[1] + n * strides.B[2], n < size)
    c = load(x.C + batch * strides.C[0] + group * strides.C[1] + n * strides.C[2], n < size)
    row = state + batch * state_strides[0]
    at = row + channels[:, None] * state_strides[1] + n[None, :] * state_strides[2]
    h = tl.exp2(delta[:, None] * A2) * load(at, kept) + (delta * u)[:, None] * b[None, :]
    store(at, h, kept)
    out = tl.sum(h * c[None, :], axis=1)
    if x.D is not None:
        out += load(x.D + channels, inside) * u
    if x.z is not None:
        gate = load(x.z + batch * strides.z[0] + channels * strides.z[1], inside)
        out *= gate * sigmoid(gate)
    store(y + batch * groups * width + channels, out, inside)


def step(call: StepCall) -> Tensor:
    """Run `selective_state_update`, without gradients."""
    batch, channels = call.u.shape
    groups, size = call.B.shape[1:]
    y = torch.empty(call.u.shape, dtype=call.u.dtype, device=call.u.device)
    if y.numel() == 0:
        return y
    width = channels // groups
    tiles = -(-width // BLOCK)
    D, bias = (None if t is None else t.contiguous() for t in (call.D, call.dt_bias))
    inputs = Inputs(call.u, call.dt, call.z, call.A, call.B, call.C, D, bias, None)
    strides = Strides(
        u=call.u.stride(),
        dt=call.dt.stride(),
        z=None if call.z is None else call.z.stride(),
        A=call.A.stride(),
        B=call.B.stride(),
        C=call.C.stride(),
        ids=None,
    )
    with on_device(call.u.device):
        update[(batch * groups * tiles,)](
            inputs, strides, call.state, call.state.stride(), y, width, groups, tiles, size,
            SOFTPLUS=call.dt_softplus, N=power_of_two(size), BLOCK=BLOCK, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return y
