"""The state-space operations as torch.library custom ops: how torch.compile(fullgraph=True) sees them.

A compiler takes an op as one opaque call whose outputs' shapes it knows; the backend is chosen when the
compiled code runs. Eager calls do not come through here: an op costs tens of microseconds. Backward runs
forward again, since backends keep what they need for gradients to themselves.

Shape legend: B batch, L length, D channels, N state size, G groups, S asked states, K kernel width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmamba.ssm.checks import check_integers
from vlmamba.ssm.dispatch import run_conv, run_scan, run_step
from vlmamba.ssm.spec import ConvCall, ScanCall, StepCall, compute_dtype

_SCAN = (
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? initial_state, bool dt_softplus, Tensor? seq_idx, bool[] reverse, Tensor? state_at, "
    "bool last_state, str? backend"
)
_CONV = (
    "Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? seq_idx, bool reverse, int lead, "
    "str? backend"
)
_STEP = (
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor state, bool dt_softplus, str? backend"
)


def _scan_call(arguments: Sequence[Any]) -> tuple[ScanCall, str | None]:
    u, dt, A, B, C, D, z, dt_bias, start, softplus, seq_idx, reverse, state_at, last, backend = arguments
    check_integers("selective_scan", "state_at", state_at, limit=u.shape[1])
    call = ScanCall(
        *(u, dt, A, B, C, D, z, dt_bias, softplus, seq_idx, start, tuple(reverse), state_at, last)
    )
    return call, backend


def _scan(*arguments: Any) -> tuple[Tensor, Tensor]:
    y, states = run_scan(*_scan_call(arguments))
    return _own(y, arguments), y.new_empty(0) if states is None else _own(states, arguments)


def _scan_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    u, A, state_at, last = arguments[0], arguments[2], arguments[12], arguments[13]
    kind = compute_dtype(u.dtype)
    if state_at is not None:
        states = u.new_empty(u.shape[0], state_at.shape[1], u.shape[2], A.shape[1], dtype=kind)
    else:
        states = u.new_empty((u.shape[0], u.shape[2], A.shape[1]) if last else 0, dtype=kind)
    return u.new_empty(u.shape), states if last or state_at is not None else u.new_empty(0)


def _scan_again(*arguments: Any) -> list[Tensor]:
    y, states = run_scan(*_scan_call(arguments))
    return [y] if states is None else [y, states]


def _conv(*arguments: Any) -> Tensor:
    *fields, backend = arguments
    return _own(run_conv(ConvCall(*fields), backend), arguments)


def _conv_fake(*arguments: Any) -> Tensor:
    x, lead = arguments[0], arguments[6]
    return x.new_empty(x.shape[0], x.shape[1] - lead, x.shape[2])


def _step_call(arguments: Sequence[Any]) -> tuple[StepCall, str | None]:
    """The call on a copy of the state."""
    u, dt, A, B, C, D, z, dt_bias, state, softplus, backend = arguments
    after = state.clone(memory_format=torch.contiguous_format)
    return StepCall(after, u, dt, A, B, C, D, z, dt_bias, softplus), backend


def _step(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, backend = _step_call(arguments)
    return _own(run_step(call, backend), arguments), call.state


def _step_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    u, state = arguments[0], arguments[8]
    return u.new_empty(u.shape), state.new_empty(state.shape)


def _step_again(*arguments: Any) -> list[Tensor]:
    return [run_step(*_step_call(arguments))]


def _own(tensor: Tensor, inputs: Sequence[Any]) -> Tensor:
    """The tensor, contiguous and in memory of its own, as an op must return it."""
    tensor = tensor.contiguous()
    shared = any(isinstance(t, Tensor) and t.data_ptr() == tensor.data_ptr() for t in inputs)
    return tensor.clone() if shared else tensor


def _define(
    name: str,
    schema: str,
    outputs: int,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    again: Callable[..., list[Tensor]],
    differentiated: Sequence[int],
) -> Any:
    """Define an op and its gradient.

    Args:
        name: Of the op.
        schema: Of its arguments.
        outputs: How many tensors it returns.
        run: Computes them.
        fake: Gives empty tensors of their shapes.
        again: Computes the differentiable ones once more, with autograd.
        differentiated: Which arguments get gradients.
    """
    returns = ", ".join(["Tensor"] * outputs)
    gradients = ", ".join(["Tensor"] * len(differentiated))
    forward, backward = f"vlmamba::{name}", f"vlmamba::{name}_backward"
    torch.library.define(forward, f"({schema}) -> ({returns})", tags=(torch.Tag.needs_fixed_stride_order,))
    torch.library.define(backward, f"(Tensor[] grads, {schema}) -> ({gradients})")
    torch.library.impl(forward, "CompositeExplicitAutograd", run)
    torch.library.register_fake(forward, fake)

    def run_backward(grads: list[Tensor], *arguments: Any) -> tuple[Tensor, ...]:
        given = list(arguments)
        leaves: list[Tensor] = []
        with torch.enable_grad():
            for index in differentiated:
                if given[index] is not None:
                    given[index] = given[index].detach().requires_grad_()
                    leaves.append(given[index])
            results = again(*given)
            found = iter(torch.autograd.grad(results, leaves, grads[: len(results)], materialize_grads=True))
        absent = grads[0].new_empty
        return tuple(_own(next(found), ()) if given[i] is not None else absent(0) for i in differentiated)

    def fake_backward(grads: list[Tensor], *arguments: Any) -> tuple[Tensor, ...]:
        empty = [grads[0].new_empty(0) if arguments[i] is None else arguments[i] for i in differentiated]
        return tuple(t.new_empty(t.shape) for t in empty)

    torch.library.impl(backward, "CompositeExplicitAutograd", run_backward)
    torch.library.register_fake(backward, fake_backward)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(t if isinstance(t, Tensor) else None for t in inputs))
        ctx.plain = [None if isinstance(t, Tensor) else t for t in inputs]

    def differentiate(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        pairs = zip(ctx.saved_tensors, ctx.plain, strict=True)
        arguments = [plain if tensor is None else tensor for tensor, plain in pairs]
        found = getattr(torch.ops.vlmamba, f"{name}_backward")(list(grads), *arguments)
        all_grads: list[Tensor | None] = [None] * len(arguments)
        for index, grad in zip(differentiated, found, strict=True):
            all_grads[index] = None if arguments[index] is None else grad
        return tuple(all_grads)

    torch.library.register_autograd(forward, differentiate, setup_context=keep)
    return getattr(torch.ops.vlmamba, name)


_scan_op = _define("selective_scan", _SCAN, 2, _scan, _scan_fake, _scan_again, range(9))
_conv_op = _define(
    *("causal_conv1d", _CONV, 1, _conv, _conv_fake, lambda *arguments: [_conv(*arguments)], range(3))
)
_step_op = _define("selective_state_update", _STEP, 2, _step, _step_fake, _step_again, range(8))


def scan(call: ScanCall, backend: str | None) -> tuple[Tensor, Tensor | None]:
    """`selective_scan` as an op."""
    y, states = _scan_op(
        *(call.u, call.dt, call.A, call.B, call.C, call.D, call.z, call.dt_bias, call.initial_state),
        *(call.dt_softplus, call.seq_idx, list(call.reverse), call.state_at, call.last_state, backend),
    )
    return y, states if call.last_state or call.state_at is not None else None


def conv(call: ConvCall, backend: str | None) -> Tensor:
    """`causal_conv1d` as an op."""
    y: Tensor = _conv_op(
        *(call.x, call.weight, call.bias, call.activation, call.seq_idx, call.reverse, call.lead, backend)
    )
    return y


def step(call: StepCall, backend: str | None) -> Tensor:
    """`selective_state_update` as an op; the op itself leaves the state alone."""
    before = call.state.detach().clone() if torch.is_grad_enabled() else call.state
    y, after = _step_op(
        *(call.u, call.dt, call.A, call.B, call.C, call.D, call.z, call.dt_bias),
        *(before, call.dt_softplus, backend),
    )
    with torch.no_grad():
        call.state.copy_(after)
    result: Tensor = y
    return result
