"""The operations on tensors without values: what they return and what they keep for backward, nothing computed.

For planning only: under torch's FakeTensorMode a whole training step runs in seconds, and its memory and FLOPs can be
counted (`vlmamba.training.tracing`). What is kept is what the native and the Triton backend keep: the inputs, and of a
scan the state before every 16th token.

Shape legend: B batch, L length, D channels, N state size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmamba.errors import BackendError
from vlmamba.ssm import compiled
from vlmamba.ssm.dispatch import needs_grad
from vlmamba.ssm.spec import Backend, ConvCall, ScanCall, ScanSpec, Verdict

KEEP = 16
"""Tokens between two kept states, as in `triton_scan` and the native scan."""


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: ScanCall, *tensors: Tensor | None) -> tuple[Tensor, Tensor | None]:
        batch, length, channels = call.u.shape
        kept = call.A.new_empty(batch, -(-length // KEEP), call.A.shape[1], channels, dtype=torch.float32)
        ctx.save_for_backward(*tensors, call.seq_idx, call.state_at, kept)
        ctx.fixed = (call.dt_softplus, list(call.reverse), call.last_state)
        return compiled.scan(call, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, seq_idx, state_at, _ = ctx.saved_tensors
        softplus, reverse, last = ctx.fixed
        given = [grad for grad in grads if grad is not None]
        found = torch.ops.vlmamba.selective_scan_backward(
            given, *tensors, softplus, seq_idx, reverse, state_at, last, None
        )
        return None, *(None if t is None else g for g, t in zip(found, tensors, strict=True))


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: ConvCall, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors, call.seq_idx)
        ctx.fixed = (call.activation, call.reverse, call.lead)
        return compiled.conv(call, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, seq_idx = ctx.saved_tensors
        activation, reverse, lead = ctx.fixed
        found = torch.ops.vlmamba.causal_conv1d_backward(
            [grad], x, weight, bias, activation, seq_idx, reverse, lead, None
        )
        return None, *(None if t is None else g for g, t in zip(found, (x, weight, bias), strict=True))


def scan(call: ScanCall) -> tuple[Tensor, Tensor | None]:
    """Shapes of `selective_scan`."""
    _refuse_values(call.u)
    tensors = (call.u, call.dt, call.A, call.B, call.C, call.D, call.z, call.dt_bias, call.initial_state)
    if not needs_grad(*tensors):
        return compiled.scan(call, None)
    y, states = _Scan.apply(call, *tensors)
    return y, states


def conv(call: ConvCall) -> Tensor:
    """Shapes of `causal_conv1d`."""
    _refuse_values(call.x)
    tensors = (call.x, call.weight, call.bias)
    if not needs_grad(*tensors):
        return compiled.conv(call, None)
    y: Tensor = _Conv.apply(call, *tensors)
    return y


def supports(spec: ScanSpec) -> Verdict:
    """Tensors of the meta device, and those under FakeTensorMode."""
    from torch._guards import detect_fake_mode

    if spec.device == "meta" or detect_fake_mode() is not None:
        return True
    return "it computes nothing; it is for planning"


def _refuse_values(tensor: Tensor) -> None:
    from torch._subclasses.fake_tensor import FakeTensor

    if not (tensor.is_meta or isinstance(tensor, FakeTensor)):
        raise BackendError(
            "backend 'shapes' computes nothing and was given real tensors; it serves `vlmamba plan` alone. Leave the "
            "choice of the backend free."
        )


BACKEND = Backend(name="shapes", priority=-10, scan=scan, conv=conv, supports=supports)
