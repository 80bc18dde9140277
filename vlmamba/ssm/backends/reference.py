"""The reference: plain loops over time in float64, differentiated by torch. The oracle of all tests.

Written to be read, not to be fast. Shape legend: B batch, L length, D channels, N state size, G groups, S
asked states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmamba.ssm.backends.torch_step import step
from vlmamba.ssm.spec import Backend, ConvCall, ScanCall, compute_dtype, segment_runs, segment_starts


def scan(call: ScanCall) -> tuple[Tensor, Tensor | None]:
    """Run `selective_scan`, one group after the other."""
    kind = _arithmetic(call.u)
    width = call.u.shape[2] // call.B.shape[2]
    parts = [
        _scan_group(call, slice(group * width, (group + 1) * width), group, reverse, kind)
        for group, reverse in enumerate(call.reverse)
    ]
    y = torch.cat([part[0] for part in parts], dim=-1)
    if call.z is not None:
        y = y * F.silu(call.z.to(kind))
    states = None
    if call.last_state or call.state_at is not None:
        states = torch.cat([part[1] for part in parts], dim=-2)
    return y.to(call.u.dtype), None if states is None else states.to(compute_dtype(call.u.dtype))


def _arithmetic(tensor: Tensor) -> torch.dtype:
    """Float64 where the device has it."""
    return compute_dtype(tensor.dtype) if tensor.device.type == "mps" else torch.float64


def _scan_group(
    call: ScanCall, channels: slice, group: int, reverse: bool, kind: torch.dtype
) -> tuple[Tensor, Tensor]:
    u = call.u[..., channels].to(kind)
    dt = call.dt[..., channels].to(kind)
    A = call.A[channels].to(kind)
    B = call.B[:, :, group].to(kind)
    C = call.C[:, :, group].to(kind)
    if call.dt_bias is not None:
        dt = dt + call.dt_bias[channels].to(kind)
    if call.dt_softplus:
        dt = F.softplus(dt)
    batch, length, width = u.shape
    starts = None if call.seq_idx is None else segment_starts(call.seq_idx, reverse=reverse)
    state = u.new_zeros(batch, width, A.shape[1])
    if call.initial_state is not None:
        state = call.initial_state[:, channels].to(kind)
    outputs: list[Tensor] = [u[:, :0]] * length
    states: list[Tensor] = [state] * length
    for t in reversed(range(length)) if reverse else range(length):
        if starts is not None:
            state = torch.where(starts[:, t, None, None], torch.zeros_like(state), state)
        decay = torch.exp(dt[:, t, :, None] * A)
        state = decay * state + (dt[:, t] * u[:, t]).unsqueeze(-1) * B[:, t, None, :]
        outputs[t] = (state * C[:, t, None, :]).sum(dim=-1)
        states[t] = state
    y = torch.stack(outputs, dim=1) if length else u
    if call.D is not None:
        y = y + call.D[channels].to(kind) * u
    if call.state_at is None:
        return y, state
    rows = torch.arange(batch, device=u.device).unsqueeze(1)
    return y, torch.stack(states, dim=1)[rows, call.state_at]


def conv(call: ConvCall) -> Tensor:
    """Run `causal_conv1d`, one token and one tap at a time."""
    kind = _arithmetic(call.x)
    x, weight = call.x.to(kind), call.weight.to(kind)
    length, taps = x.shape[1], weight.shape[1]
    runs = None if call.seq_idx is None else segment_runs(call.seq_idx)
    step = -1 if call.reverse else 1
    answered = range(length - call.lead) if call.reverse else range(call.lead, length)
    outputs = []
    for t in answered:
        total = torch.zeros_like(x[:, t])
        for tap in range(taps):
            source = t - step * (taps - 1 - tap)
            if not 0 <= source < length:
                continue
            term = weight[:, tap] * x[:, source]
            if runs is not None:
                term = torch.where(
                    (runs[:, source] == runs[:, t]).unsqueeze(-1), term, torch.zeros_like(term)
                )
            total = total + term
        outputs.append(total)
    y = torch.stack(outputs, dim=1) if outputs else x[:, : len(answered)]
    if call.bias is not None:
        y = y + call.bias.to(kind)
    return (F.silu(y) if call.activation == "silu" else y).to(call.x.dtype)


BACKEND = Backend(name="reference", priority=0, scan=scan, conv=conv, step=step)
