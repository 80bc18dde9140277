"""Launches the Triton kernels of the selective scan, and differentiates it.

Forward keeps the inputs and the state before every 16th token. Arithmetic is float32.

Shape legend: B batch, L length, D channels, N state size, G groups, S splits of time, R asked states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmamba.ssm.backends import triton_backward as backward_kernels
from vlmamba.ssm.backends import triton_forward as forward_kernels
from vlmamba.ssm.backends.torch_chunked import scan as scan_empty
from vlmamba.ssm.backends.triton_backward import Gradients, Wanted
from vlmamba.ssm.backends.triton_tiles import Cut, Inputs, Strides
from vlmamba.ssm.backends.triton_tuning import Tiling, on_device, power_of_two, programs_wanted, tune
from vlmamba.ssm.spec import ScanCall, no_autocast

KEEP = 16
"""Tokens between two saved states: 4 N / KEEP bytes for each token and channel."""

SHORTEST_SPLIT = 64
"""Fewest tokens of a split of time."""

FORWARD_TILINGS = (Tiling(32, 4), Tiling(32, 2), Tiling(64, 2), Tiling(16, 4))
BACKWARD_TILINGS = (Tiling(32, 4), Tiling(32, 2), Tiling(16, 4), Tiling(16, 2))
"""Candidates, the one used without tuning first."""


class _Plan:
    """A call as kernels see it, for one tiling."""

    def __init__(self, call: ScanCall, tiling: Tiling) -> None:
        batch, length, channels = call.u.shape
        size, groups = call.A.shape[1], call.B.shape[2]
        width = channels // groups
        tiles = -(-width // tiling.block)
        programs = batch * groups * tiles
        splits = max(1, min(programs_wanted(call.u.device) // programs, length // SHORTEST_SPLIT))
        split_length = -(-length // (splits * KEEP)) * KEEP
        reverse = sum(1 << group for group, flag in enumerate(call.reverse) if flag)
        self.inputs = Inputs(
            call.u,
            call.dt,
            call.z,
            call.A,
            call.B,
            call.C,
            _dense(call.D),
            _dense(call.dt_bias),
            call.seq_idx,
        )
        self.strides = Strides(
            u=call.u.stride(),
            dt=call.dt.stride(),
            z=None if call.z is None else call.z.stride(),
            A=call.A.stride(),
            B=call.B.stride(),
            C=call.C.stride(),
            ids=None if call.seq_idx is None else call.seq_idx.stride(),
        )
        self.cut = Cut(
            batch, length, width, tiles, groups, -(-length // split_length), split_length, reverse, size
        )
        self.options = {
            "SOFTPLUS": call.dt_softplus,
            "N": power_of_two(size),
            "BLOCK": tiling.block,
            "STEPS": tiling.steps,
            **tiling.options,
        }
        self.device = call.u.device
        self.tiling = tiling

    def new(self, *shape: int) -> Tensor:
        """A float32 tensor to fill."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def states(self) -> Tensor:
        """(B, S, N, D) to fill."""
        return self.new(self.cut.batches, self.cut.splits, self.cut.size, self.cut.groups * self.cut.width)

    def run(self, kernel: Any, *arguments: Any, splits: int | None = None, **options: Any) -> None:
        """Launch a kernel over all tiles, groups, splits and rows."""
        cut = self.cut if splits is None else self.cut._replace(splits=splits)
        grid = (cut.batches * cut.splits * cut.groups * cut.tiles,)
        kernel[grid](self.inputs, self.strides, cut, 1, *arguments, **self.options, **options)

    def starts(
        self, kernel: Any, arguments: tuple[Any, ...], initial: Tensor | None, *, backward: bool
    ) -> Any:
        """What each split starts from, (B, S, N, D) and its strides, from a kernel that scans each by itself."""
        if self.cut.splits == 1:
            if initial is None:
                return None, None
            row, channel, state = initial.stride()
            return initial, (row, 0, state, channel)
        ends, starts = self.states(), self.states()
        sums = self.new(*ends.shape[:2], ends.shape[3])
        self.run(kernel, *arguments, ends, sums)
        grid = (self.cut.batches * self.cut.groups * self.cut.tiles,)
        strides = None if initial is None else initial.stride()
        forward_kernels.combine[grid](
            self.inputs.A, self.strides.A, self.cut, 1, ends, sums, initial, strides, starts,
            BACKWARD=backward, N=self.options["N"], BLOCK=self.options["BLOCK"], **self.tiling.options,
        )  # fmt: skip
        return starts, starts.stride()


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _forward(call: ScanCall, tiling: Tiling, *, save: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y, the asked states and, when they are to be kept or needed, the saved ones."""
    plan = _Plan(call, tiling)
    batch, length, channels = call.u.shape
    size = call.A.shape[1]
    y = torch.empty(call.u.shape, dtype=call.u.dtype, device=call.u.device)
    saved = plan.new(batch, -(-length // KEEP), size, channels) if save or call.state_at is not None else None
    states = plan.new(batch, channels, size) if call.last_state else None
    start, strides = plan.starts(forward_kernels.local_states, (), call.initial_state, backward=False)
    plan.run(forward_kernels.scan_forward, start, strides, y, saved, states, KEEP=KEEP)
    if call.state_at is not None:
        asked = call.state_at.shape[1]
        states = plan.new(batch, asked, channels, size)
        if asked:
            arguments = (saved, call.state_at.contiguous(), states, asked)
            plan.run(forward_kernels.states_at, *arguments, splits=asked, KEEP=KEEP)
    return y, states, saved if save else None


def _wanted(call: ScanCall, d_states: Tensor | None) -> Wanted:
    """The gradients of states asked for by position, as the kernels look them up."""
    if d_states is None or call.state_at is None or call.state_at.shape[1] == 0:
        return Wanted(None, None, None, None)
    at = call.state_at
    batch, count = at.shape
    slots = torch.arange(count, device=at.device, dtype=torch.int32)
    last = torch.full((batch, call.u.shape[1]), -1, device=at.device, dtype=torch.int32)
    last.scatter_reduce_(1, at, slots.expand(batch, -1), "amax")
    earlier = (at.unsqueeze(2) == at.unsqueeze(1)) & (slots.unsqueeze(0) < slots.unsqueeze(1))
    chain = torch.where(earlier, slots, -1).amax(dim=2).int()
    return Wanted(d_states.float().contiguous(), last, chain.contiguous(), count)


def _backward(
    call: ScanCall, tiling: Tiling, saved: Tensor, dy: Tensor | None, d_states: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients in the order of `_tensors`."""
    plan = _Plan(call, tiling)
    cut = plan.cut
    if dy is None:
        dy = torch.zeros((), dtype=call.u.dtype, device=call.u.device).expand(call.u.shape)
    wanted = _wanted(call, d_states)
    d_last = d_states if call.last_state else None
    arguments = (dy, dy.stride(), wanted)
    start, strides = plan.starts(backward_kernels.local_gradients, arguments, d_last, backward=True)
    vectors = (cut.batches, cut.splits, call.u.shape[2])
    parts = plan.new(2, cut.tiles, *call.B.shape)
    empty = torch.empty(call.u.shape, dtype=call.u.dtype, device=call.u.device)
    grads = Gradients(
        u=empty,
        dt=torch.empty_like(empty),
        z=None if call.z is None else torch.empty_like(empty),
        A=plan.states(),
        B=parts[0],
        C=parts[1],
        D=None if call.D is None else plan.new(*vectors),
        bias=None if call.dt_bias is None else plan.new(*vectors),
        initial=None if call.initial_state is None else plan.new(*call.initial_state.shape),
    )
    plan.run(backward_kernels.scan_backward, saved, start, strides, *arguments, grads, KEEP=KEEP)
    dB, dC = parts.sum(dim=1).unbind(0)
    dD, dbias = (None if part is None else part.sum(dim=(0, 1)) for part in (grads.D, grads.bias))
    return grads.u, grads.dt, grads.A.sum(dim=(0, 1)).t(), dB, dC, dD, grads.z, dbias, grads.initial


def _tensors(call: ScanCall) -> tuple[Tensor | None, ...]:
    """The differentiable arguments, in the order of `ScanCall`'s first fields."""
    return (call.u, call.dt, call.A, call.B, call.C, call.D, call.z, call.dt_bias, call.initial_state)


def _tuned(call: ScanCall, kind: str, candidates: tuple[Tiling, ...], run: Callable[[Tiling], Any]) -> Any:
    """Run with the tiling that is fastest for calls of this kind."""
    batch, length, channels = call.u.shape
    size = power_of_two(call.A.shape[1])
    shape = (power_of_two(batch), power_of_two(length), channels, size, len(call.reverse), call.u.dtype)
    key = (kind, *shape, call.z is None, call.seq_idx is None, call.state_at is None)
    with on_device(call.u.device):
        return run(tune(key, candidates, size, call.u.device, run))


class _TritonScan(torch.autograd.Function):
    """`scan` with gradients for every floating-point argument."""

    @staticmethod
    def forward(ctx: Any, call: ScanCall, *tensors: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y, states, saved = _tuned(call, "forward", FORWARD_TILINGS, lambda t: _forward(call, t, save=True))
        ctx.save_for_backward(*tensors, call.seq_idx, call.state_at, saved)
        ctx.fixed = (call.dt_softplus, call.reverse, call.last_state)
        ctx.set_materialize_grads(False)
        return y, states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_states: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, seq_idx, state_at, saved = ctx.saved_tensors
        u, dt, A, B, C, D, z, dt_bias, start = tensors
        softplus, reverse, last = ctx.fixed
        call = ScanCall(u, dt, A, B, C, D, z, dt_bias, softplus, seq_idx, start, reverse, state_at, last)
        with no_autocast(u.device):
            grads = _tuned(
                call,
                "backward",
                BACKWARD_TILINGS,
                lambda tiling: _backward(call, tiling, saved, dy, d_states),
            )
        pairs = zip(grads, tensors, strict=True)
        return None, *(None if g is None or t is None else g.to(t.dtype) for g, t in pairs)


def scan(call: ScanCall) -> tuple[Tensor, Tensor | None]:
    """Run `selective_scan`."""
    if call.u.numel() == 0 or call.A.shape[1] == 0:
        return scan_empty(call)
    tensors = _tensors(call)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y, states = _TritonScan.apply(call, *tensors)
        return y, states
    y, states, _ = _tuned(call, "inference", FORWARD_TILINGS, lambda t: _forward(call, t, save=False))
    return y, states
