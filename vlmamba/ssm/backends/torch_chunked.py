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

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmamba.ssm.backends.torch_conv import conv
from vlmamba.ssm.spec import Backend, ScanCall, ScanSpec, Verdict, compute_dtype, no_autocast, segment_starts

BLOCK_ELEMENTS = 32768
"""Most elements of one step of a block: ATen starts its threads above it, which costs more than a step."""

CHUNK_STEPS = 8
"""T. Memory for the saved states is 1/T of all states; longer chunks fall out of the cache."""


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows and channels that are scanned together: one group, one direction."""

    rows: slice
    channels: slice
    group: int
    reverse: bool

    def take(self, tensor: Tensor, kind: torch.dtype) -> Tensor:
        """The block's own contiguous (L, B, D) copy of a (B, L, D) tensor, in scan direction."""
        return self._turn(tensor[self.rows, :, self.channels].to(kind))

    def take_matrix(self, tensor: Tensor, kind: torch.dtype) -> Tensor:
        """The block's own contiguous (L, B, N) copy of a (B, L, G, N) tensor, in scan direction."""
        return self._turn(tensor[self.rows, :, self.group].to(kind))

    def put(self, target: Tensor, values: Tensor) -> None:
        """Write (L, B, D) values in scan direction back into a (B, L, D) tensor."""
        target[self.rows, :, self.channels] = (values.flip(0) if self.reverse else values).transpose(0, 1)

    def add_matrix(self, target: Tensor, values: Tensor) -> None:
        """Add (L, B, N) values in scan direction to a (B, L, G, N) tensor."""
        target[self.rows, :, self.group] += (values.flip(0) if self.reverse else values).transpose(0, 1)

    def _turn(self, part: Tensor) -> Tensor:
        part = part.transpose(0, 1).contiguous()
        return part.flip(0) if self.reverse else part


def _blocks(batch: int, width: int, size: int, directions: tuple[bool, ...]) -> list[_Block]:
    """Cut rows and channels so that a step has at most BLOCK_ELEMENTS elements, rows first."""
    if not batch or not width:
        return []
    channels = -(-width // -(-width * size // BLOCK_ELEMENTS))
    rows = max(1, min(batch, BLOCK_ELEMENTS // (channels * size)))
    rows = -(-batch // -(-batch // rows))
    return [
        _Block(
            slice(row, min(row + rows, batch)),
            slice(group * width + first, group * width + min(first + channels, width)),
            group,
            reverse,
        )
        for group, reverse in enumerate(directions)
        for first in range(0, width, channels)
        for row in range(0, batch, rows)
    ]


@dataclass(slots=True)
class _Marks:
    """Special places of one chunk, as flat (T, B) indices."""

    restarts: Tensor | None = None
    asked: Tensor | None = None
    row: Tensor | None = None
    slot: Tensor | None = None


class _Plan:
    """The blocks of a call, and where the states of each restart or are asked for."""

    def __init__(self, call: ScanCall) -> None:
        batch, self.length, channels = call.u.shape
        groups = len(call.reverse)
        self.blocks = _blocks(batch, channels // groups, call.A.shape[1], call.reverse)
        self._starts: dict[bool, Tensor] = {}
        self._state_at = call.state_at
        if call.seq_idx is not None:
            for reverse in set(call.reverse):
                starts = segment_starts(call.seq_idx, reverse=reverse).t()
                if bool(starts.any()):
                    self._starts[reverse] = starts.flip(0) if reverse else starts
        self._cache: dict[tuple[int, bool], list[_Marks]] = {}
        self._spaces: dict[tuple[int, ...], _Space] = {}

    def space(self, x: _Inputs, *, backward: bool) -> _Space:
        """Work space for a block; blocks of one shape share it."""
        key = (*x.u.shape, backward)
        if key not in self._spaces:
            self._spaces[key] = _Space(x, backward=backward)
        return self._spaces[key]

    def free(self) -> None:
        """Let go of the work space."""
        self._spaces.clear()

    def marks(self, block: _Block) -> list[_Marks]:
        """The special places of each chunk of a block, in scan order."""
        key = (block.rows.start, block.reverse)
        if key not in self._cache:
            self._cache[key] = [self._marks(block, start) for start in range(0, self.length, CHUNK_STEPS)]
        return self._cache[key]

    def _marks(self, block: _Block, start: int) -> _Marks:
        marks = _Marks()
        starts = self._starts.get(block.reverse)
        if starts is not None:
            places = starts[start : start + CHUNK_STEPS, block.rows].reshape(-1).nonzero().squeeze(1)
            marks.restarts = places if places.numel() else None
        if self._state_at is not None:
            at = self._state_at[block.rows]
            at = (self.length - 1 - at if block.reverse else at) - start
            row, slot = ((at >= 0) & (at < CHUNK_STEPS)).nonzero(as_tuple=True)
            if row.numel():
                marks.asked = at[row, slot] * at.shape[0] + row
                marks.row, marks.slot = row + block.rows.start, slot
        return marks


class _Inputs:
    """A block's inputs in the dtype of the arithmetic, and views of them for each chunk."""

    def __init__(self, call: ScanCall, block: _Block) -> None:
        kind = compute_dtype(call.u.dtype)
        self.u = block.take(call.u, kind)
        self.raw = block.take(call.dt, kind)
        if call.dt_bias is not None:
            self.raw = self.raw + call.dt_bias[block.channels].to(kind)
        self.delta = F.softplus(self.raw) if call.dt_softplus else self.raw
        self.delta_u = self.delta * self.u
        self.A = call.A[block.channels].to(kind).t().contiguous()
        self.B = block.take_matrix(call.B, kind)
        self.C = block.take_matrix(call.C, kind)
        self.delta_chunks = self.delta.unsqueeze(2).split(CHUNK_STEPS)
        self.delta_u_chunks = self.delta_u.unsqueeze(2).split(CHUNK_STEPS)
        self.B_columns = self.B.unsqueeze(3).split(CHUNK_STEPS)
        self.B_rows = _flat_chunks(self.B)
        self.C_rows = _flat_chunks(self.C)


def _flat_chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views (T * B, 1, X) of each chunk of a contiguous (L, B, X) tensor."""
    return tensor.flatten(0, 1).unsqueeze(1).split(CHUNK_STEPS * tensor.shape[1])


class _Space:
    """Work space for one chunk. `states[0]` is the state before it, `states[t + 1]` the one after step t."""

    def __init__(self, x: _Inputs, *, backward: bool) -> None:
        rows, width = x.u.shape[1:]
        shape = (min(CHUNK_STEPS, x.u.shape[0]), rows, x.A.shape[0], width)
        self.decay = x.u.new_empty(shape)
        self.states = x.u.new_empty((shape[0] + 1, *shape[1:]))
        self.decay_steps = self.decay.unbind(0)
        self.state_steps = self.states.unbind(0)
        if backward:
            self.grad = x.u.new_empty(shape)
            self.work = x.u.new_empty(shape)
            self.grad_steps = self.grad.unbind(0)

    def run(self, x: _Inputs, chunk: int, restarts: Tensor | None) -> int:
        """Fill the decays and states of a chunk, given `states[0]`; returns its number of steps."""
        delta = x.delta_chunks[chunk]
        steps = delta.shape[0]
        full = steps == self.decay.shape[0]
        decay = self.decay if full else self.decay[:steps]
        torch.mul(delta, x.A, out=decay)
        decay.exp_()
        if restarts is not None:
            decay.flatten(0, 1).index_fill_(0, restarts, 0)
        torch.mul(x.B_columns[chunk], x.delta_u_chunks[chunk], out=self.states[1 : steps + 1])
        decays, states = self.decay_steps, self.state_steps
        for t in range(steps):
            states[t + 1].addcmul_(decays[t], states[t])
        return steps

    def run_grad(self, columns: Tensor, dy: Tensor, steps: int, marks: _Marks, asked: Tensor | None) -> None:
        """Fill the gradients of the states of a chunk, given in `self.carry` what comes from later."""
        grad = self.grad[:steps]
        torch.mul(columns, dy, out=grad)
        if asked is not None and marks.asked is not None:
            grad.flatten(0, 1).index_add_(0, marks.asked, asked)
        decays, grads = self.decay_steps, self.grad_steps
        grads[steps - 1].add_(self.carry)
        for t in range(steps - 1, 0, -1):
            grads[t - 1].addcmul_(decays[t], grads[t])
        torch.mul(decays[0], grads[0], out=self.carry)

    carry: Tensor


def _block_forward(
    call: ScanCall, block: _Block, plan: _Plan, y: Tensor, states: Tensor | None, *, save: bool
) -> Tensor | None:
    """Scan one block into `y` (and `states`); returns the states before each chunk, (chunks, B, N, D)."""
    x, marks = _Inputs(call, block), plan.marks(block)
    space = plan.space(x, backward=False)
    first = space.state_steps[0]
    if call.initial_state is None:
        first.zero_()
    else:
        first.copy_(call.initial_state[block.rows, block.channels].transpose(1, 2))
    out = torch.empty_like(x.u)
    out_rows = _flat_chunks(out)
    saved = first.new_empty(len(marks), *first.shape) if save else None
    end = first
    for chunk, mark in enumerate(marks):
        if chunk:
            first.copy_(end)
        if saved is not None:
            saved[chunk] = first
        steps = space.run(x, chunk, mark.restarts)
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
    block: _Block,
    plan: _Plan,
    saved: Tensor,
    dy: Tensor | None,
    d_states: Tensor | None,
    grads: _Gradients,
) -> None:
    """Walk one block backwards through its chunks and write its share of `grads`."""
    x, marks = _Inputs(call, block), plan.marks(block)
    space = plan.space(x, backward=True)
    kind = x.u.dtype
    d_out = torch.zeros_like(x.u) if dy is None else block.take(dy, kind)
    z = None if call.z is None else block.take(call.z, kind)
    inner = d_out if z is None else d_out * F.silu(z)
    inner_chunks, inner_rows = inner.unsqueeze(2).split(CHUNK_STEPS), _flat_chunks(inner)
    C_columns, delta_u_rows = x.C.unsqueeze(3).split(CHUNK_STEPS), _flat_chunks(x.delta_u)
    d_delta, d_delta_u, d_B, d_C, d_A = (torch.empty_like(t) for t in (x.u, x.u, x.B, x.C, x.A))
    d_A.zero_()
    ones = x.u.new_ones(1, CHUNK_STEPS * x.u.shape[1])
    d_delta_chunks, d_delta_u_rows = d_delta.split(CHUNK_STEPS), _flat_chunks(d_delta_u)
    d_B_rows, d_C_rows = _flat_chunks(d_B), _flat_chunks(d_C)
    y = torch.empty_like(x.u) if grads.z is not None else None
    y_rows = None if y is None else _flat_chunks(y)
    space.carry = torch.zeros_like(space.state_steps[0])
    if d_states is not None and call.last_state:
        space.carry.copy_(d_states[block.rows, block.channels].transpose(1, 2))
    for chunk in range(len(marks) - 1, -1, -1):
        mark = marks[chunk]
        space.state_steps[0].copy_(saved[chunk])
        steps = space.run(x, chunk, mark.restarts)
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
    block: _Block,
    x: _Inputs,
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


def _forward(call: ScanCall, plan: _Plan, *, save: bool) -> tuple[Tensor, Tensor | None, list[Tensor]]:
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
        plan = _Plan(call)
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
        y, states, _ = _forward(call, _Plan(call), save=False)
    return y, states


def supports(spec: ScanSpec) -> Verdict:
    """Everything but float64, which is the reference's."""
    return True if spec.dtype != torch.float64 else "it computes in float32; float64 is served by 'reference'"


BACKEND = Backend(name="torch", priority=10, scan=scan, conv=conv, supports=supports)
