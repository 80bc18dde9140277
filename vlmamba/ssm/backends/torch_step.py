"""One decode step in plain torch, in the dtype of the arithmetic: serves the `reference` and `torch` backends.

Shape legend: B batch, D channels, N state size, G groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmamba.ssm.spec import StepCall, compute_dtype


def step(call: StepCall) -> Tensor:
    """Run `selective_state_update`."""
    kind = compute_dtype(call.u.dtype)
    batch, channels, size = call.state.shape
    rows = (batch, call.B.shape[1], channels // call.B.shape[1])
    x, delta = call.u.to(kind), call.dt.to(kind)
    if call.dt_bias is not None:
        delta = delta + call.dt_bias.to(kind)
    if call.dt_softplus:
        delta = F.softplus(delta)
    decay = torch.exp(delta.unsqueeze(-1) * call.A.to(kind))
    increment = (delta * x).view(*rows, 1) * call.B.to(kind).unsqueeze(2)
    old = call.state.clone() if torch.is_grad_enabled() else call.state
    new = torch.addcmul(increment.reshape(call.state.shape), decay, old.to(kind))
    with torch.no_grad():
        call.state.copy_(new)
    y = torch.matmul(new.view(*rows, size), call.C.to(kind).unsqueeze(-1)).reshape(batch, channels)
    if call.D is not None:
        y = torch.addcmul(y, x, call.D.to(kind))
    if call.z is not None:
        y = y * F.silu(call.z.to(kind))
    return y.to(call.u.dtype)
