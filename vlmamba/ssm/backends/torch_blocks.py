"""How the chunked scan cuts a call into blocks and chunks, and the work space of a chunk.

Shape legend: B batch, L length, D channels, N state size, G groups, S asked states, T steps of a chunk.
Of a block, B and D are its own rows and channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmamba.ssm.spec import ScanCall, compute_dtype, segment_starts

BLOCK_ELEMENTS = 2**15
"""Most elements of one step of a block on a CPU: ATen starts threads above it, costlier than the step."""

CHUNK_STEPS = 8
"""T on a CPU; longer chunks fall out of the cache. The saved states are 1/T of all states."""

STEEP = 4.0
"""Larger exponents are exact on a CPU: the rounding of one, 2^-24 of its size, is the relative error of a decay."""

DEVICE_BLOCK_ELEMENTS, DEVICE_CHUNK_STEPS = 2**20, 16
"""The same for accelerators, where few launches and little memory count."""


@dataclass(frozen=True, slots=True)
class Block:
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


def cut_into_blocks(
    batch: int, width: int, size: int, directions: tuple[bool, ...], elements: int
) -> list[Block]:
    """Cut rows and channels so that a step has at most that many elements, rows first."""
    if not batch or not width:
        return []
    channels = -(-width // -(-width * size // elements))
    rows = max(1, min(batch, elements // (channels * size)))
    rows = -(-batch // -(-batch // rows))
    return [
        Block(
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
class Marks:
    """Special places of one chunk, as flat (T, B) indices; restarts also as rows, by step."""

    restarts: Tensor | None = None
    restart_rows: dict[int, Tensor] = field(default_factory=dict)
    asked: Tensor | None = None
    row: Tensor | None = None
    slot: Tensor | None = None


class Plan:
    """The blocks of a call, and where their states restart or are asked for (worked out on the CPU)."""

    def __init__(self, call: ScanCall) -> None:
        batch, self.length, channels = call.u.shape
        groups = len(call.reverse)
        on_cpu = call.u.device.type == "cpu"
        elements = BLOCK_ELEMENTS if on_cpu else DEVICE_BLOCK_ELEMENTS
        self.steps = CHUNK_STEPS if on_cpu else DEVICE_CHUNK_STEPS
        self.blocks = cut_into_blocks(batch, channels // groups, call.A.shape[1], call.reverse, elements)
        self._starts: dict[bool, Tensor] = {}
        self._device = call.u.device
        self._state_at = None if call.state_at is None else call.state_at.cpu()
        if call.seq_idx is not None:
            seq_idx = call.seq_idx.cpu()
            for reverse in set(call.reverse):
                starts = segment_starts(seq_idx, reverse=reverse).t()
                if bool(starts.any()):
                    self._starts[reverse] = starts.flip(0) if reverse else starts
        self._cache: dict[tuple[int, bool], list[Marks]] = {}
        self._spaces: dict[tuple[int, ...], Space] = {}

    def space(self, x: Inputs, *, backward: bool) -> Space:
        """Work space for a block; blocks of one shape share it."""
        key = (*x.u.shape, backward)
        if key not in self._spaces:
            self._spaces[key] = Space(x, backward=backward)
        return self._spaces[key]

    def free(self) -> None:
        """Let go of the work space."""
        self._spaces.clear()

    def marks(self, block: Block) -> list[Marks]:
        """The special places of each chunk of a block, in scan order."""
        key = (block.rows.start, block.reverse)
        if key not in self._cache:
            self._cache[key] = [self._marks(block, start) for start in range(0, self.length, self.steps)]
        return self._cache[key]

    def _marks(self, block: Block, start: int) -> Marks:
        marks = Marks()
        starts = self._starts.get(block.reverse)
        if starts is not None:
            here = starts[start : start + self.steps, block.rows]
            places = here.reshape(-1).nonzero().squeeze(1)
            if places.numel():
                marks.restarts = places.to(self._device)
                steps = here.any(dim=1).nonzero().squeeze(1).tolist()
                marks.restart_rows = {t: here[t].nonzero().squeeze(1).to(self._device) for t in steps}
        if self._state_at is not None:
            at = self._state_at[block.rows]
            at = (self.length - 1 - at if block.reverse else at) - start
            row, slot = ((at >= 0) & (at < self.steps)).nonzero(as_tuple=True)
            if row.numel():
                flat = at[row, slot] * at.shape[0] + row
                indices = (flat, row + block.rows.start, slot)
                marks.asked, marks.row, marks.slot = (index.to(self._device) for index in indices)
        return marks


class Inputs:
    """A block's inputs in the dtype of the arithmetic, and views of them for each chunk."""

    def __init__(self, call: ScanCall, block: Block, steps: int) -> None:
        self.steps = steps
        kind = compute_dtype(call.u.dtype)
        self.u = block.take(call.u, kind)
        self.raw = block.take(call.dt, kind)
        if call.dt_bias is not None:
            self.raw = self.raw + call.dt_bias[block.channels].to(kind)
        self.delta = F.softplus(self.raw) if call.dt_softplus else self.raw
        self.delta_u = self.delta * self.u
        self.A = call.A[block.channels].to(kind).t().contiguous()
        self.steep = self.u.device.type == "cpu" and self._largest_exponent() > STEEP
        self.B = block.take_matrix(call.B, kind)
        self.C = block.take_matrix(call.C, kind)
        self.delta_chunks = self.delta.unsqueeze(2).split(steps)
        self.delta_u_chunks = self.delta_u.unsqueeze(2).split(steps)
        self.B_columns = self.B.unsqueeze(3).split(steps)
        self.B_rows = flat_chunks(self.B, steps)
        self.C_rows = flat_chunks(self.C, steps)

    def _largest_exponent(self) -> float:
        if not self.delta.numel() or not self.A.numel():
            return 0.0
        return float(self.delta.abs().amax() * self.A.abs().amax())


def flat_chunks(tensor: Tensor, steps: int) -> tuple[Tensor, ...]:
    """Views (T * B, 1, X) of each chunk of a contiguous (L, B, X) tensor."""
    return tensor.flatten(0, 1).unsqueeze(1).split(steps * tensor.shape[1])


class Space:
    """Work space for one chunk. `states[0]` is the state before it, `states[t + 1]` the one after step t."""

    def __init__(self, x: Inputs, *, backward: bool) -> None:
        rows, width = x.u.shape[1:]
        shape = (min(x.steps, x.u.shape[0]), rows, x.A.shape[0], width)
        self.decay = x.u.new_empty(shape)
        self.states = x.u.new_empty((shape[0] + 1, *shape[1:]))
        self.decay_steps = self.decay.unbind(0)
        self.state_steps = self.states.unbind(0)
        if backward:
            self.grad = x.u.new_empty(shape)
            self.work = x.u.new_empty(shape)
            self.grad_steps = self.grad.unbind(0)
            self.carry = x.u.new_empty(shape[1:])

    def run(self, x: Inputs, chunk: int, marks: Marks) -> int:
        """Fill the decays and states of a chunk, given `states[0]`; returns its number of steps."""
        delta = x.delta_chunks[chunk]
        steps = delta.shape[0]
        full = steps == self.decay.shape[0]
        decay = self.decay if full else self.decay[:steps]
        torch.mul(delta, x.A, out=decay)
        # On CPUs addcmul rounds once, so that it gives what the product lost to rounding.
        lost = torch.addcmul(decay, delta, x.A, value=-1) if x.steep else None
        decay.exp_()
        if lost is not None:  # exp(x - lost); products beyond float32 have lost nothing that counts
            decay.mul_(lost.nan_to_num_(0.0).clamp_(-1e-3, 1e-3).neg_().add_(1.0))
        torch.mul(x.B_columns[chunk], x.delta_u_chunks[chunk], out=self.states[1 : steps + 1])
        decays, states = self.decay_steps, self.state_steps
        for t in range(steps):
            states[t + 1].addcmul_(decays[t], _forgotten(states[t], marks.restart_rows.get(t)))
        return steps

    def run_grad(self, columns: Tensor, dy: Tensor, steps: int, marks: Marks, asked: Tensor | None) -> None:
        """Fill the gradients of the states of a chunk, given in `self.carry` what comes from later."""
        grad = self.grad[:steps]
        torch.mul(columns, dy, out=grad)
        if asked is not None and marks.asked is not None:
            grad.flatten(0, 1).index_add_(0, marks.asked, asked)
        decays, grads = self.decay_steps, self.grad_steps
        grads[steps - 1].add_(self.carry)
        for t in range(steps - 1, 0, -1):
            grads[t - 1].addcmul_(decays[t], _forgotten(grads[t], marks.restart_rows.get(t)))
        torch.mul(decays[0], _forgotten(grads[0], marks.restart_rows.get(0)), out=self.carry)


def _forgotten(state: Tensor, rows: Tensor | None) -> Tensor:
    """The state (B, N, D) with zeros in some rows, whatever they hold: a decay of zero would keep NaN."""
    return state if rows is None else state.index_fill(0, rows, 0)
