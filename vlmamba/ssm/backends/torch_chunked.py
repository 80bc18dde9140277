"""The chunked scan in plain torch: for every device, no compiler needed.

Rows and channels are cut into blocks small enough for the cache; a block walks through time in chunks of T
steps. Per chunk the decays exp(dt A) and the increments dt u B are one operation each, the recurrence is one
in-place multiply-add a step, and y is a batched matrix product. Autograd saves the inputs and the state at
the start of each chunk; backward computes the states of a chunk again. Decays are never divided or
accumulated in the exponent, so nothing overflows.

A block copies its part of the inputs into time-major order, (L, B, D), turned around when it scans in
reverse; so the walk itself knows one direction only. Inside a chunk everything is laid out (T, B, N, D):
channels innermost, so that all broadcasts vectorise.

Shape legend: B batch, L length, D channels, N state size, G groups, S asked states, T steps of a chunk. Of a
block, B and D are its own rows and channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmamba.ssm.backends.torch_blocks import Block, Inputs, Plan, flat_chunks
from vlmamba.ssm.backends.torch_conv import conv
from vlmamba.ssm.backends.torch_step import step
from vlmamba.ssm.spec import Backend, ScanCall, ScanSpec, Verdict, compute_dtype, no_autocast


def _block_forward(
    call: ScanCall, block: Block, plan: Plan, y: Tensor, states: Tensor | None, *, save: bool
) -> Tensor | None:
    """Scan one block into `y` (and `states`); returns the states before each chunk, (chunks, B, N, D)."""
    x, marks = Inputs(call, block, plan.steps), plan.marks(block)
    space = plan.space(x, backward=False)
    first = space.state_steps[0]
    if call.initial_state is None:
        first.zero_()
    else:
        first.copy_(call.initial_state[block.rows, block.channels].transpose(1, 2))
    out = torch.empty_like(x.u)
    out_rows = flat_chunks(out, plan.steps)
    saved = first.new_empty(len(marks), *first.shape) if save else None
    end = first
    for chunk, mark in enumerate(marks):
        if chunk:
            first.copy_(end)
        if saved is not None:
            saved[chunk] = first
        steps = space.run(x, chunk, mark)
        after = space.states[1 : steps + 1].flatten(0, 1)
        torch.bmm(x.C_rows[chunk], after, out=out_rows[chunk])
        if states is not None and mark.asked is not None:
            states[mark.row, mark.slot, block.channels] = after[mark.asked].transpose(1, 2)
        end = space.state_steps[steps]
    if states is not None and call.last_state:
        states[block.rows, block.channels] = end.transpose(1, 2)
    if call.D is not None:
        out.addcmul_(x.u, call.D[block.channels].to(out.dtype))
    if call.z is not None:
        out.mul_(F.silu(block.take(call.z, out.dtype)))
    block.put(y, out)
    return saved


class _Gradients:
    """Gradients of a call in the layouts of its arguments; those that add up over blocks are kept precise."""

    def __init__(self, call: ScanCall, *, wants_A: bool, wants_z: bool) -> None:
        kind = compute_dtype(call.u.dtype)

        def zeros(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.new_zeros(tensor.shape, dtype=kind)

        self.u = call.u.new_empty(call.u.shape)
        self.dt = call.dt.new_empty(call.dt.shape)
        self.z = call.z.new_empty(call.z.shape) if call.z is not None and wants_z else None
        self.A = zeros(call.A) if wants_A else None
        self.B = call.B.new_zeros(call.B.shape, dtype=kind)
        self.C = call.C.new_zeros(call.C.shape, dtype=kind)
        self.D = zeros(call.D)
        self.dt_bias = zeros(call.dt_bias)
        self.initial_state = zeros(call.initial_state)


def _block_backward(
    call: ScanCall,
    block: Block,
    plan: Plan,
    saved: Tensor,
    dy: Tensor | None,
    d_states: Tensor | None,
    grads: _Gradients,
) -> None:
    """Walk one block backwards through its chunks and write its share of `grads`."""
    x, marks = Inputs(call, block, plan.steps), plan.marks(block)
    space = plan.space(x, backward=True)
    kind = x.u.dtype
    d_out = torch.zeros_like(x.u) if dy is None else block.take(dy, kind)
    z = None if call.z is None else block.take(call.z, kind)
    inner = d_out if z is None else d_out * F.silu(z)
    inner_chunks, inner_rows = inner.unsqueeze(2).split(plan.steps), flat_chunks(inner, plan.steps)
    C_columns, delta_u_rows = x.C.unsqueeze(3).split(plan.steps), flat_chunks(x.delta_u, plan.steps)
    d_delta, d_delta_u, d_B, d_C, d_A = (torch.empty_like(t) for t in (x.u, x.u, x.B, x.C, x.A))
    d_A.zero_()
    ones = x.u.new_ones(1, plan.steps * x.u.shape[1])
    d_delta_chunks, d_delta_u_rows = d_delta.split(plan.steps), flat_chunks(d_delta_u, plan.steps)
    d_B_rows, d_C_rows = flat_chunks(d_B, plan.steps), flat_chunks(d_C, plan.steps)
    y = torch.empty_like(x.u) if grads.z is not None else None
    y_rows = None if y is None else flat_chunks(y, plan.steps)
    if d_states is None or not call.last_state:
        space.carry.zero_()
    else:
        space.carry.copy_(d_states[block.rows, block.channels].transpose(1, 2))
    for chunk in range(len(marks) - 1, -1, -1):
        mark = marks[chunk]
        space.state_steps[0].copy_(saved[chunk])
        steps = space.run(x, chunk, mark)
        asked = None
        if d_states is not None and mark.asked is not None:
            asked = d_states[mark.row, mark.slot, block.channels].transpose(1, 2)
        space.run_grad(C_columns[chunk], inner_chunks[chunk], steps, mark, asked)
        after, grad = space.states[1 : steps + 1].flatten(0, 1), space.grad[:steps]
        flat = grad.flatten(0, 1)
        if y_rows is not None:
            torch.bmm(x.C_rows[chunk], after, out=y_rows[chunk])
        torch.bmm(inner_rows[chunk], after.transpose(1, 2), out=d_C_rows[chunk])
        torch.bmm(delta_u_rows[chunk], flat.transpose(1, 2), out=d_B_rows[chunk])
        torch.bmm(x.B_rows[chunk], flat, out=d_delta_u_rows[chunk])
        grad.mul_(space.decay[:steps]).mul_(space.states[:steps])
        if mark.restarts is not None:
            flat.index_fill_(0, mark.restarts, 0)
        work = space.work[:steps]
        torch.mul(grad, x.A, out=work)
        torch.sum(work, dim=2, out=d_delta_chunks[chunk])
        if grads.A is None:
            continue
        torch.mul(grad, x.delta_chunks[chunk], out=work)
        d_A.view(1, -1).addmm_(ones[:, : flat.shape[0]], work.view(flat.shape[0], -1))
    block.add_matrix(grads.B, d_B)
    block.add_matrix(grads.C, d_C)
    if grads.A is not None:
        grads.A[block.channels] += d_A.t()
    if grads.initial_state is not None:
        grads.initial_state[block.rows, block.channels] = space.carry.transpose(1, 2)
    _finish_block(call, block, x, grads, d_delta, d_delta_u, inner, d_out, z, y)


def _finish_block(
    call: ScanCall,
    block: Block,
    x: Inputs,
    grads: _Gradients,
    d_delta: Tensor,
    d_delta_u: Tensor,
    inner: Tensor,
    d_out: Tensor,
    z: Tensor | None,
    y: Tensor | None,
) -> None:
    """Carry the gradients of a block's inner quantities on to its inputs."""
    d_delta.addcmul_(d_delta_u, x.u)
    if call.dt_softplus:
        d_delta.mul_(torch.sigmoid(x.raw))
    d_u = d_delta_u.mul_(x.delta)
    if call.D is not None and grads.D is not None:
        skip = call.D[block.channels].to(x.u.dtype)
        d_u.addcmul_(inner, skip)
        grads.D[block.channels] += (inner * x.u).sum(dim=(0, 1))
        if y is not None:
            y.addcmul_(x.u, skip)
    if z is not None and y is not None and grads.z is not None:
        block.put(grads.z, torch.ops.aten.silu_backward(y.mul_(d_out), z))
    if grads.dt_bias is not None:
        grads.dt_bias[block.channels] += d_delta.sum(dim=(0, 1))
    block.put(grads.u, d_u)
    block.put(grads.dt, d_delta)


def _forward(call: ScanCall, plan: Plan, *, save: bool) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    batch, _, channels = call.u.shape
    y = torch.empty(call.u.shape, dtype=call.u.dtype, device=call.u.device)
    states = None
    if call.state_at is not None or call.last_state:
        places = () if call.state_at is None else (call.state_at.shape[1],)
        kind = compute_dtype(call.u.dtype)
        states = y.new_empty(batch, *places, channels, call.A.shape[1], dtype=kind)
    kept = [_block_forward(call, block, plan, y, states, save=save) for block in plan.blocks]
    plan.free()
    return y, states, [saved for saved in kept if saved is not None]


class _ChunkedScan(torch.autograd.Function):
    """`scan` with gradients for every floating-point argument."""

    @staticmethod
    def forward(ctx: Any, call: ScanCall, *tensors: Tensor | None) -> tuple[Tensor, Tensor | None]:
        plan = Plan(call)
        y, states, saved = _forward(call, plan, save=True)
        ctx.save_for_backward(*tensors, call.seq_idx, call.state_at, *saved)
        ctx.plan = plan
        ctx.fixed = (call.dt_softplus, call.reverse, call.last_state)
        ctx.set_materialize_grads(False)
        return y, states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_states: Tensor | None) -> tuple[Tensor | None, ...]:
        stored = ctx.saved_tensors  # read once: activation checkpointing allows no second unpacking
        *tensors, seq_idx, state_at = stored[:11]
        saved = stored[11:]
        call = _call(tensors, seq_idx, state_at, ctx.fixed)
        grads = _Gradients(call, wants_A=ctx.needs_input_grad[3], wants_z=ctx.needs_input_grad[7])
        with no_autocast(call.u.device):
            for block, states in zip(ctx.plan.blocks, saved, strict=True):
                _block_backward(call, block, ctx.plan, states, dy, d_states, grads)
        ctx.plan.free()
        found = (grads.u, grads.dt, grads.A, grads.B, grads.C, grads.D, grads.z, grads.dt_bias)
        pairs = zip((*found, grads.initial_state), tensors, strict=True)
        return None, *(None if g is None or t is None else g.to(t.dtype) for g, t in pairs)


def _tensors(call: ScanCall) -> tuple[Tensor | None, ...]:
    """The differentiable arguments, in the order of `_call`."""
    return (call.u, call.dt, call.A, call.B, call.C, call.D, call.z, call.dt_bias, call.initial_state)


def _call(
    tensors: list[Any],
    seq_idx: Tensor | None,
    state_at: Tensor | None,
    fixed: tuple[bool, tuple[bool, ...], bool],
) -> ScanCall:
    u, dt, A, B, C, D, z, dt_bias, initial_state = tensors
    softplus, reverse, last_state = fixed
    return ScanCall(
        u, dt, A, B, C, D, z, dt_bias, softplus, seq_idx, initial_state, reverse, state_at, last_state
    )


def scan(call: ScanCall) -> tuple[Tensor, Tensor | None]:
    """Run `selective_scan`."""
    tensors = _tensors(call)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y, states = _ChunkedScan.apply(call, *tensors)
        return y, states
    with torch.no_grad():
        y, states, _ = _forward(call, Plan(call), save=False)
    return y, states


def supports(spec: ScanSpec) -> Verdict:
    """Everything but float64, which is the reference's."""
    return True if spec.dtype != torch.float64 else "it computes in float32; float64 is served by 'reference'"


BACKEND = Backend(name="torch", priority=10, scan=scan, conv=conv, supports=supports, step=step)
