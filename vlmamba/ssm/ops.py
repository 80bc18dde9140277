"""The selective scan of Mamba and its single decode step.

The recurrence is equation 2 of the Mamba paper (Gu and Dao 2023, arXiv:2312.00752) with the discretisation of
its section 3.2 as its code has it: exp(dt A) for the decay and dt B for the input.

Shape legend: B batch, L length, D channels, N state size, G groups, S asked states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vlmamba.errors import ShapeError
from vlmamba.ssm import compiled
from vlmamba.ssm.checks import check_device, check_dtype, check_floating, check_integers, check_shape, grouped
from vlmamba.ssm.dispatch import run_scan, run_step
from vlmamba.ssm.spec import ScanCall, StepCall, compute_dtype


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = True,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    reverse: bool | Sequence[bool] = False,
    state_at: Tensor | None = None,
    return_last_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the selective scan over whole sequences.

    With delta = softplus(dt + dt_bias), for every channel d of group g:

        h[t] = exp(delta[t] A) h[t-1] + delta[t] u[t] B[t, g]
        y[t] = (C[t, g] . h[t] + D u[t]) silu(z[t])

    Views of any row stride are read in place. Arithmetic and states are float32 (float64 for float64 inputs).

    Args:
        u: Input, (B, L, D).
        dt: Raw time step, (B, L, D).
        A: Continuous decay, (D, N), negative for a stable state.
        B: Input matrix, (B, L, N) or (B, L, G, N); channel d belongs to group d // (D // G).
        C: Output matrix, shaped as `B`.
        D: Skip weight, (D).
        z: Gate, (B, L, D).
        dt_bias: Added to `dt` before the softplus, (D).
        dt_softplus: Whether `dt` goes through softplus.
        seq_idx: (B, L) integers; the state restarts at zero wherever neighbouring values differ.
        initial_state: (B, D, N), the state before the first token in scan direction. Differentiable.
        reverse: Scan from the last token to the first; or one bool for each group.
        state_at: (B, S) integer time positions (0 is the first token, whatever the direction).
        return_last_state: Whether to return the state after the last token in scan direction.
        backend: Name of a backend; by default the best one that can serve.

    Returns:
        `y` (B, L, D) in u's dtype. With `state_at` the pair of y and the states right after those tokens,
        (B, S, D, N) (whether or not `return_last_state` is set); otherwise with `return_last_state` the pair
        of y and the last state, (B, D, N). States are float32 and differentiable.

    Raises:
        ShapeError: Shapes, dtypes or devices do not fit.
        BackendError: The backend asked for is unknown or cannot serve the call.
    """
    call = _checked_scan(
        ScanCall(
            *(u, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx, initial_state),
            *(reverse, state_at, return_last_state),  # type: ignore[arg-type]
        )
    )
    run = compiled.scan if torch.compiler.is_compiling() else run_scan
    y, states = run(call, backend)
    return y if states is None else (y, states)


def selective_state_update(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Run one decode step and overwrite the state in place.

    Gradients reach every argument of this step but not the steps before it: the state counts as a constant.

    Args:
        state: (B, D, N), float32; holds the next state afterwards.
        u: (B, D), as are `dt` and `z`.
        dt: Raw time step.
        A: (D, N).
        B: (B, N) or (B, G, N), as is `C`.
        C: Output matrix.
        D: (D), as is `dt_bias`.
        z: Gate.
        dt_bias: Added to `dt` before the softplus.
        dt_softplus: Whether `dt` goes through softplus.
        backend: Name of a backend; by default the best one that can serve.

    Returns:
        y, (B, D) in u's dtype.

    Raises:
        ShapeError: Shapes, dtypes or devices do not fit.
        BackendError: The backend asked for is unknown or cannot serve the call.
    """
    name = "selective_state_update"
    check_shape(name, "u", u, (None, None), "(B, D)")
    check_shape(name, "A", A, (u.shape[-1], None), "(D, N)")
    check_shape(name, "state", state, (*u.shape, A.shape[1]), "(B, D, N)")
    call = StepCall(state, u, dt, A, B, C, D, z, dt_bias, dt_softplus)
    B, C = _checked_inputs(name, call, {"state": state})
    call = replace(call, B=B, C=C)
    run = compiled.step if torch.compiler.is_compiling() else run_step
    return run(call, backend)


def _checked_scan(call: ScanCall) -> ScanCall:
    """The call in the one form that backends read, from the arguments as they were given."""
    name, reverse = "selective_scan", call.reverse
    check_shape(name, "u", call.u, (None, None, None), "(B, L, D)")
    batch, length, channels = call.u.shape
    check_shape(name, "A", call.A, (channels, None), "(D, N)")
    check_shape(name, "seq_idx", call.seq_idx, (batch, length), "(B, L)")
    check_integers(name, "seq_idx", call.seq_idx)
    check_shape(name, "initial_state", call.initial_state, (batch, channels, call.A.shape[1]), "(B, D, N)")
    check_shape(name, "state_at", call.state_at, (batch, None), "(B, S)")
    check_integers(name, "state_at", call.state_at, limit=length)
    check_device(name, call.u, {"seq_idx": call.seq_idx, "state_at": call.state_at})
    B, C = _checked_inputs(name, call, {"initial_state": call.initial_state})
    groups = B.shape[2]
    if not isinstance(reverse, bool | Sequence):
        raise ShapeError(f"{name}: reverse is {reverse!r}, but a bool, or one for each group, is needed.")
    directions = (reverse,) * groups if isinstance(reverse, bool) else tuple(bool(flag) for flag in reverse)
    if len(directions) != groups:
        raise ShapeError(
            f"{name}: reverse has {len(directions)} entries for {groups} groups of B and C; give one for each group, "
            "or a single bool."
        )
    state = call.initial_state
    return replace(
        call,
        B=B,
        C=C,
        initial_state=None if state is None else state.to(compute_dtype(call.u.dtype)),
        reverse=directions,
        state_at=None if call.state_at is None else call.state_at.long(),
        last_state=call.last_state and call.state_at is None,
    )


def _checked_inputs(
    name: str, call: ScanCall | StepCall, states: Mapping[str, Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Check what a scan and a step have in common; B and C with their group axis."""
    u, lead, (channels, size) = call.u, tuple(call.u.shape[:-1]), call.A.shape
    for label, tensor in (("dt", call.dt), ("z", call.z)):
        check_shape(name, label, tensor, tuple(u.shape), f"({'B, L' if len(lead) == 2 else 'B'}, D) like u")
    for label, tensor in (("D", call.D), ("dt_bias", call.dt_bias)):
        check_shape(name, label, tensor, (channels,), "(D)")
    B, C = (grouped(name, label, x, lead, channels, size) for label, x in (("B", call.B), ("C", call.C)))
    if B.shape != C.shape:
        raise ShapeError(f"{name}: B has shape {tuple(B.shape)}, C {tuple(C.shape)}; they must be equal.")
    for label, tensor in (("dt", call.dt), ("z", call.z), ("B", B), ("C", C)):
        check_dtype(name, label, tensor, u.dtype, "like u")
    tensors = {"dt": call.dt, "A": call.A, "B": B, "C": C, "D": call.D, "z": call.z, "dt_bias": call.dt_bias}
    check_device(name, u, {**tensors, **states})
    check_floating(name, {"u": u, **tensors, **states})
    return B, C
