"""Runs checked calls on the backend that serves them.

Shape legend: B batch, L length, D channels, N state size, K kernel width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmamba.ssm.registry import choose_backend
from vlmamba.ssm.spec import ConvCall, ScanCall, ScanSpec, StepCall, no_autocast


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a gradient of one of these tensors may be asked for."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def run_scan(call: ScanCall, backend: str | None = None) -> tuple[Tensor, Tensor | None]:
    """Outputs (B, L, D) and the states asked for.

    Raises:
        BackendError: The backend asked for is unknown or cannot serve the call.
    """
    with no_autocast(call.u.device):
        return choose_backend(_scan_spec(call), backend).scan(call)


def run_conv(call: ConvCall, backend: str | None = None) -> Tensor:
    """Outputs (B, L - lead, D).

    Raises:
        BackendError: The backend asked for is unknown or cannot serve the call.
    """
    chosen = choose_backend(_conv_spec(call), backend)
    assert chosen.conv is not None
    with no_autocast(call.x.device):
        return chosen.conv(call)


def run_step(call: StepCall, backend: str | None = None) -> Tensor:
    """Outputs (B, D); the state is overwritten.

    Raises:
        BackendError: The backend asked for is unknown or cannot serve the call.
    """
    chosen = choose_backend(_step_spec(call), backend)
    assert chosen.step is not None
    with no_autocast(call.u.device):
        return chosen.step(call)


def _scan_spec(call: ScanCall) -> ScanSpec:
    features = {
        "D": call.D is not None,
        "z": call.z is not None,
        "dt_bias": call.dt_bias is not None,
        "seq_idx": call.seq_idx is not None,
        "initial_state": call.initial_state is not None,
        "reverse": any(call.reverse),
        "group_reverse": len(set(call.reverse)) > 1,
        "state_at": call.state_at is not None,
        "last_state": call.last_state,
    }
    tensors = (call.u, call.dt, call.A, call.B, call.C, call.D, call.z, call.dt_bias, call.initial_state)
    return ScanSpec(
        op="scan",
        device=call.u.device.type,
        dtype=call.u.dtype,
        batch=call.u.shape[0],
        length=call.u.shape[1],
        channels=call.u.shape[2],
        state_size=call.A.shape[1],
        groups=call.B.shape[2],
        features=frozenset(key for key, used in features.items() if used),
        needs_grad=needs_grad(*tensors),
    )


def _conv_spec(call: ConvCall) -> ScanSpec:
    features = {
        "activation": call.activation is not None,
        "seq_idx": call.seq_idx is not None,
        "initial_state": call.lead > 0,
        "reverse": call.reverse,
    }
    return ScanSpec(
        op="conv",
        device=call.x.device.type,
        dtype=call.x.dtype,
        batch=call.x.shape[0],
        length=call.x.shape[1] - call.lead,
        channels=call.x.shape[2],
        state_size=call.weight.shape[1],
        features=frozenset(key for key, used in features.items() if used),
        needs_grad=needs_grad(call.x, call.weight, call.bias),
    )


def _step_spec(call: StepCall) -> ScanSpec:
    features = (("D", call.D), ("z", call.z), ("dt_bias", call.dt_bias))
    tensors = (call.u, call.dt, call.A, call.B, call.C, call.D, call.z, call.dt_bias)
    return ScanSpec(
        op="step",
        device=call.u.device.type,
        dtype=call.u.dtype,
        batch=call.u.shape[0],
        channels=call.u.shape[1],
        state_size=call.A.shape[1],
        groups=call.B.shape[1],
        features=frozenset([key for key, used in features if used is not None]),
        needs_grad=needs_grad(*tensors),
    )
