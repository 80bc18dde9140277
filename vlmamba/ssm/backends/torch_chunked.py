"""The chunked scan in plain torch: for every device, no compiler needed.

Rows and channels are cut into blocks small enough for the cache; a block walks through time in chunks of T
steps. Per chunk the decays exp(dt A) and the increments dt u B are one operation each, the recurrence is one
in-place multiply-add a step, and y is a batched matrix product. Autograd saves the inputs and the state at
the start of each chunk; backward computes the states of a chunk again. Decays are never divided or
accumulated in the exponent, so nothing overflows.

Inside a block everything is laid out (T, B, N, D): channels innermost, so that all broadcasts vectorise.

Shape legend: B batch, L length, D channels, N state size, G groups, S asked states, T steps of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmamba.ssm.backends.torch_conv import conv
from vlmamba.ssm.spec import Backend, ScanCall, ScanSpec, Verdict, compute_dtype, segment_starts

BLOCK_ELEMENTS = 32768
"""Most elements of one step of a block: ATen starts its threads above it, which costs more than a step."""

CHUNK_STEPS = 16


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows and channels that are scanned together: one group, one direction."""

    rows: slice
    channels: slice
    group: int
    reverse: bool


@dataclass(slots=True)
class _Chunk:
    """One stretch of time of a block: which flat (T, B) places restart, and which hold asked states."""

    start: int
    stop: int
    restarts: Tensor | None
    places: Tensor | None
    asked: tuple[Tensor, Tensor] | None

    @property
    def steps(self) -> int:
        return self.stop - self.start


def _blocks(batch: int, width: int, size: int, directions: tuple[bool, ...]) -> list[_Block]:
    """Cut rows and channels so that a step has at most BLOCK_ELEMENTS elements, rows first."""
    pieces = -(-width * size // BLOCK_ELEMENTS)
    channels = -(-width // pieces)
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


class _Plan:
    """The blocks of a call, and for each of them its chunks in scan order."""

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        directions: tuple[bool, ...],
        seq_idx: Tensor | None,
        state_at: Tensor | None,
    ) -> None:
        batch, length, channels, size = shape
        self.blocks = _blocks(batch, channels // len(directions), size, directions)
        self.length = length
        self.num_chunks = -(-length // CHUNK_STEPS)
        self._starts = {}
        if seq_idx is not None:
            for reverse in set(directions):
                starts = segment_starts(seq_idx, reverse=reverse).t()
                self._starts[reverse] = starts if bool(starts.any()) else None
        self._state_at = state_at
        self._cache: dict[tuple[int, bool], list[_Chunk]] = {}

    def chunks(self, block: _Block) -> list[_Chunk]:
        """The chunks of a block, in scan order."""
        key = (block.rows.start, block.reverse)
        if key not in self._cache:
            order = range(0, self.length, CHUNK_STEPS)
            chunks = [self._chunk(block, start) for start in order]
            self._cache[key] = chunks[::-1] if block.reverse else chunks
        return self._cache[key]

    def _chunk(self, block: _Block, start: int) -> _Chunk:
        stop = min(start + CHUNK_STEPS, self.length)
        restarts = places = asked = None
        starts = self._starts.get(block.reverse)
        if starts is not None:
            restarts = starts[start:stop, block.rows].reshape(-1).nonzero().squeeze(1)
            restarts = restarts if restarts.numel() else None
        if self._state_at is not None:
            positions = self._state_at[block.rows]
            row, slot = ((positions >= start) & (positions < stop)).nonzero(as_tuple=True)
            if row.numel():
                places = (positions[row, slot] - start) * positions.shape[0] + row
                asked = (row + block.rows.start, slot)
        return _Chunk(start, stop, restarts, places, asked)


class _Buffers:
    """The work space of one block shape, with its steps at hand."""

    def __init__(self, like: Tensor, rows: int, size: int, width: int, names: str) -> None:
        shape = (CHUNK_STEPS, rows, size, width)
        self.decay = like.new_empty(shape)
        self.states = like.new_empty((CHUNK_STEPS + 1, *shape[1:]))
        self.decay_at = self.decay.unbind(0)
        self.state_at = self.states.unbind(0)
        if "g" in names:
            self.grad = like.new_empty(shape)
            self.grad_at = self.grad.unbind(0)
            self.work = like.new_empty(shape)


class _Inputs:
    """The inputs in the dtype of the arithmetic; B and C as (L, B, G, N), A transposed."""

    def __init__(
        self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, dt_bias: Tensor | None, softplus: bool
    ) -> None:
        kind = compute_dtype(u.dtype)
        self.u = u.to(kind)
        self.raw = dt.to(kind) if dt_bias is None else dt.to(kind) + dt_bias.to(kind)
        self.delta = F.softplus(self.raw) if softplus else self.raw
        self.delta_u = self.delta * self.u
        self.A = A.to(kind).t().contiguous()
        self.B = B.to(kind).permute(1, 0, 2, 3).contiguous()
        self.C = C.to(kind).permute(1, 0, 2, 3).contiguous()


def _part(tensor: Tensor, block: _Block, chunk: _Chunk) -> Tensor:
    """(T, B, 1, D) view of a (B, L, D) tensor."""
    return tensor[block.rows, chunk.start : chunk.stop, block.channels].transpose(0, 1).unsqueeze(2)


def _matrix(tensor: Tensor, block: _Block, chunk: _Chunk) -> Tensor:
    """(T * B, 1, N) of an (L, B, G, N) tensor."""
    part = tensor[chunk.start : chunk.stop, block.rows, block.group]
    return part.reshape(-1, 1, part.shape[-1])


def _states_of_chunk(x: _Inputs, block: _Block, chunk: _Chunk, work: _Buffers) -> tuple[Tensor, Tensor]:
    """Fill the decays and states of a chunk.

    The state before the chunk must be in slot 0, or in slot T for a reversed block.

    Returns:
        Views of the states after, and before, each step, (T, B, N, D).
    """
    steps = chunk.steps
    decay = work.decay[:steps]
    torch.mul(_part(x.delta, block, chunk), x.A[:, block.channels], out=decay)
    decay.exp_()
    if chunk.restarts is not None:
        decay.view(-1, *decay.shape[2:]).index_fill_(0, chunk.restarts, 0)
    after = work.states[:steps] if block.reverse else work.states[1 : steps + 1]
    before = work.states[1 : steps + 1] if block.reverse else work.states[:steps]
    matrix = _matrix(x.B, block, chunk).view(steps, -1, x.B.shape[-1], 1)
    torch.mul(matrix, _part(x.delta_u, block, chunk), out=after)
    decays, states = work.decay_at, work.state_at
    if block.reverse:
        for t in range(steps - 1, -1, -1):
            states[t].addcmul_(decays[t], states[t + 1])
    else:
        for t in range(steps):
            states[t + 1].addcmul_(decays[t], states[t])
    return after, before


def _flat(tensor: Tensor) -> Tensor:
    """(T * B, N, D) view of a (T, B, N, D) tensor."""
    return tensor.view(-1, *tensor.shape[2:])


def _buffers_for(x: _Inputs, plan: _Plan, names: str) -> Iterator[tuple[int, _Block, _Buffers]]:
    """All blocks with work space; blocks of one shape share it."""
    spaces: dict[tuple[int, int], _Buffers] = {}
    for number, block in enumerate(plan.blocks):
        rows = block.rows.stop - block.rows.start
        width = block.channels.stop - block.channels.start
        if (rows, width) not in spaces:
            spaces[rows, width] = _Buffers(x.u, rows, x.A.shape[0], width, names)
        yield number, block, spaces[rows, width]


def _run_forward(
    x: _Inputs,
    plan: _Plan,
    initial_state: Tensor | None,
    asked: Tensor | None,
    last: Tensor | None,
    save: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Scan all blocks: y before skip and gate, and the states before each chunk of each block."""
    y = torch.empty_like(x.delta_u, memory_format=torch.contiguous_format)
    saved = []
    for _, block, work in _buffers_for(x, plan, ""):
        chunks = plan.chunks(block)
        rows, size, width = work.decay.shape[1:]
        starts = y.new_empty(len(chunks), rows, size, width) if save else None
        edge = _edge(block, chunks[0], begin=True)
        if initial_state is None:
            work.state_at[edge].zero_()
        else:
            work.state_at[edge].copy_(initial_state[block.rows, block.channels].transpose(1, 2))
        for number, chunk in enumerate(chunks):
            if starts is not None:
                starts[number].copy_(work.state_at[_edge(block, chunk, begin=True)])
            after, _ = _states_of_chunk(x, block, chunk, work)
            part = torch.bmm(_matrix(x.C, block, chunk), _flat(after)).view(chunk.steps, rows, width)
            y[block.rows, chunk.start : chunk.stop, block.channels] = part.transpose(0, 1)
            if asked is not None and chunk.places is not None and chunk.asked is not None:
                found = _flat(after).index_select(0, chunk.places).transpose(1, 2)
                asked[chunk.asked[0], chunk.asked[1], block.channels] = found
            end = work.state_at[_edge(block, chunk, begin=False)]
            if number + 1 < len(chunks):
                work.state_at[_edge(block, chunks[number + 1], begin=True)].copy_(end)
            elif last is not None:
                last[block.rows, block.channels] = end.transpose(1, 2)
        if starts is not None:
            saved.append(starts)
    return y, saved


def _edge(block: _Block, chunk: _Chunk, *, begin: bool) -> int:
    """The slot of the state before (begin) or after a chunk."""
    return chunk.steps if begin == block.reverse else 0


class _Gradients:
    """Sums of a backward run, in the layouts of `_Inputs`; B's and C's as (L, B, G, N)."""

    def __init__(self, x: _Inputs, initial_state: Tensor | None, *, wants_y: bool) -> None:
        self.delta = torch.empty_like(x.delta_u, memory_format=torch.contiguous_format)
        self.delta_u = torch.empty_like(self.delta)
        self.y = torch.empty_like(self.delta) if wants_y else None
        self.A = torch.zeros_like(x.A)
        self.B = torch.zeros_like(x.B)
        self.C = torch.zeros_like(x.C)
        self.initial_state = None if initial_state is None else torch.empty_like(initial_state)


def _run_backward(
    x: _Inputs,
    plan: _Plan,
    saved: list[Tensor],
    grads: _Gradients,
    dy: Tensor,
    d_asked: Tensor | None,
    d_last: Tensor | None,
) -> None:
    """Walk all blocks backwards through their chunks and add up `grads`."""
    for number, block, work in _buffers_for(x, plan, "g"):
        chunks = plan.chunks(block)
        carry = work.decay.new_zeros(work.decay.shape[1:])
        if d_last is not None:
            carry.copy_(d_last[block.rows, block.channels].transpose(1, 2))
        for chunk, start in zip(reversed(chunks), saved[number].flip(0).unbind(0), strict=True):
            work.state_at[_edge(block, chunk, begin=True)].copy_(start)
            after, before = _states_of_chunk(x, block, chunk, work)
            if d_asked is None or chunk.asked is None:
                extra = None
            else:
                extra = d_asked[chunk.asked[0], chunk.asked[1], block.channels].transpose(1, 2)
            _gradient_of_states(x, block, chunk, work, dy, extra, carry)
            _chunk_gradients(x, block, chunk, work, grads, dy, after, before)
        if grads.initial_state is not None:
            grads.initial_state[block.rows, block.channels] = carry.transpose(1, 2)


def _gradient_of_states(
    x: _Inputs, block: _Block, chunk: _Chunk, work: _Buffers, dy: Tensor, extra: Tensor | None, carry: Tensor
) -> None:
    """Fill the gradients of a chunk's states; `carry` comes from the later chunk, goes to the earlier one."""
    steps = chunk.steps
    grad = work.grad[:steps]
    matrix = _matrix(x.C, block, chunk).view(steps, -1, x.C.shape[-1], 1)
    torch.mul(matrix, _part(dy, block, chunk), out=grad)
    if extra is not None and chunk.places is not None:
        _flat(grad).index_add_(0, chunk.places, extra)
    decays, grads = work.decay_at, work.grad_at
    if block.reverse:
        grads[0].add_(carry)
        for t in range(steps - 1):
            grads[t + 1].addcmul_(decays[t], grads[t])
        torch.mul(decays[steps - 1], grads[steps - 1], out=carry)
    else:
        grads[steps - 1].add_(carry)
        for t in range(steps - 1, 0, -1):
            grads[t - 1].addcmul_(decays[t], grads[t])
        torch.mul(decays[0], grads[0], out=carry)


def _chunk_gradients(
    x: _Inputs,
    block: _Block,
    chunk: _Chunk,
    work: _Buffers,
    grads: _Gradients,
    dy: Tensor,
    after: Tensor,
    before: Tensor,
) -> None:
    """Add the gradients of a chunk, given its states and their gradients; the buffers are used up."""
    steps, rows, size, width = after.shape
    span, states = slice(chunk.start, chunk.stop), _flat(after)
    grad, decay, free = work.grad[:steps], work.decay[:steps], work.work[:steps]
    if grads.y is not None:
        y = torch.bmm(_matrix(x.C, block, chunk), states).view(steps, rows, width)
        grads.y[block.rows, span, block.channels] = y.transpose(0, 1)
    column = _part(dy, block, chunk).reshape(steps * rows, width, 1)
    grads.C[span, block.rows, block.group] += torch.bmm(states, column).view(steps, rows, size)
    column = _part(x.delta_u, block, chunk).reshape(steps * rows, width, 1)
    grads.B[span, block.rows, block.group] += torch.bmm(_flat(grad), column).view(steps, rows, size)
    d_delta_u = torch.bmm(_matrix(x.B, block, chunk), _flat(grad)).view(steps, rows, width)
    grads.delta_u[block.rows, span, block.channels] = d_delta_u.transpose(0, 1)
    decay.mul_(before).mul_(grad)
    torch.mul(decay, x.A[:, block.channels], out=free)
    grads.delta[block.rows, span, block.channels] = free.sum(dim=2).transpose(0, 1)
    decay.mul_(_part(x.delta, block, chunk))
    grads.A[:, block.channels] += _flat(decay).sum(dim=0)


class _ChunkedScan(torch.autograd.Function):
    """`scan` with gradients for every floating-point argument."""

    @staticmethod
    def forward(
        ctx: Any,
        call: ScanCall,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        save = any(ctx.needs_input_grad)
        y, states, plan, saved = _forward(call, u, dt, A, B, C, D, z, dt_bias, initial_state, save=save)
        if save:
            ctx.save_for_backward(u, dt, A, B, C, D, z, dt_bias, initial_state, *saved)
            ctx.plan, ctx.softplus, ctx.state_at = plan, call.dt_softplus, call.state_at is not None
            ctx.set_materialize_grads(False)
        return y, states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_states: Tensor | None) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, D, z, dt_bias, initial_state, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        x = _Inputs(u, dt, A, B, C, dt_bias, ctx.softplus)
        dy = torch.zeros_like(x.delta_u) if dy is None else dy.to(x.u.dtype)
        inner = dy if z is None else dy * F.silu(z.to(dy.dtype))
        grads = _Gradients(x, initial_state, wants_y=z is not None and needs[6])
        d_asked, d_last = (d_states, None) if ctx.state_at else (None, d_states)
        with torch.autocast(u.device.type, enabled=False):
            _run_backward(x, ctx.plan, saved, grads, inner, d_asked, d_last)
        d_u = x.delta * grads.delta_u
        d_dt = grads.delta.addcmul_(grads.delta_u, x.u)
        if ctx.softplus:
            d_dt = d_dt.mul_(torch.sigmoid(x.raw))
        d_D = d_z = d_bias = None
        if D is not None:
            d_u.addcmul_(inner, D.to(inner.dtype))
            d_D = (inner * x.u).sum(dim=(0, 1)).to(D.dtype) if needs[5] else None
        if z is not None and grads.y is not None:
            y = grads.y if D is None else grads.y.addcmul_(x.u, D.to(inner.dtype))
            d_z = torch.ops.aten.silu_backward(dy * y, z.to(dy.dtype)).to(z.dtype)
        if dt_bias is not None and needs[7]:
            d_bias = d_dt.sum(dim=(0, 1)).to(dt_bias.dtype)
        d_B, d_C = (g.permute(1, 0, 2, 3) for g in (grads.B, grads.C))
        return (
            None,
            d_u.to(u.dtype),
            d_dt.to(dt.dtype),
            grads.A.t().to(A.dtype),
            d_B.to(B.dtype),
            d_C.to(C.dtype),
            d_D,
            d_z,
            d_bias,
            grads.initial_state,
        )


def _forward(
    call: ScanCall,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    *,
    save: bool,
) -> tuple[Tensor, Tensor | None, _Plan, list[Tensor]]:
    batch, length, channels = u.shape
    size = A.shape[1]
    x = _Inputs(u, dt, A, B, C, dt_bias, call.dt_softplus)
    plan = _Plan((batch, length, channels, size), call.reverse, call.seq_idx, call.state_at)
    asked = last = None
    if call.state_at is not None:
        asked = x.u.new_empty(batch, call.state_at.shape[1], channels, size)
    elif call.last_state:
        last = x.u.new_empty(batch, channels, size)
    y, saved = _run_forward(x, plan, initial_state, asked, last, save)
    if D is not None:
        y.addcmul_(x.u, D.to(y.dtype))
    if z is not None:
        y.mul_(F.silu(z.to(y.dtype)))
    return y.to(u.dtype), asked if last is None else last, plan, saved


def scan(call: ScanCall) -> tuple[Tensor, Tensor | None]:
    """Run `selective_scan`."""
    tensors = (call.u, call.dt, call.A, call.B, call.C, call.D, call.z, call.dt_bias, call.initial_state)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y, states = _ChunkedScan.apply(call, *tensors)
        return y, states
    with torch.no_grad():
        y, states, _, _ = _forward(call, *tensors, save=False)
    return y, states


def supports(spec: ScanSpec) -> Verdict:
    """Everything but float64, which is the reference's."""
    return True if spec.dtype != torch.float64 else "it computes in float32; float64 is served by 'reference'"


BACKEND = Backend(name="torch", priority=10, scan=scan, conv=conv, supports=supports)
