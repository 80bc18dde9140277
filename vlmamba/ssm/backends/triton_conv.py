"""Launches the Triton kernels of the causal convolution, and differentiates it.

Shape legend: B batch, L tokens with history, D channels, K kernel width, P stretches of time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmamba.ssm.backends.triton_conv_kernels import Convolution, conv_backward, conv_forward
from vlmamba.ssm.backends.triton_tuning import Tiling, on_device, power_of_two, tune
from vlmamba.ssm.spec import ConvCall, no_autocast

TILINGS = (
    Tiling(64, 16, warps=4),
    Tiling(64, 32, warps=4),
    Tiling(128, 16, warps=4),
    Tiling(32, 16, warps=2),
)
"""Candidates, the one used without tuning first."""

REPEAT = 4
"""Tiles of time that one program walks through."""


def _launch(
    kernel: Any, call: ConvCall, tiling: Tiling, steps: int, arguments: Callable[[int], tuple]
) -> None:
    """Run a kernel over so many scan steps; `arguments` makes its own arguments from P."""
    batch, length, channels = call.x.shape
    stretches = -(-steps // (tiling.steps * REPEAT))
    tiles = -(-channels // tiling.block)
    seen = Convolution(
        x=call.x,
        weight=call.weight,
        bias=None if call.bias is None else call.bias.contiguous(),
        ids=call.seq_idx,
        x_strides=call.x.stride(),
        weight_strides=call.weight.stride(),
        ids_strides=None if call.seq_idx is None else call.seq_idx.stride(),
        length=length,
        lead=call.lead,
        channels=channels,
        tiles=tiles,
        stretches=stretches,
        reverse=int(call.reverse),
    )
    kernel[(batch * stretches * tiles,)](
        seen,
        *arguments(stretches),
        SILU=call.activation == "silu",
        WIDTH=call.weight.shape[1],
        BLOCK=tiling.block,
        STEPS=tiling.steps,
        REPEAT=REPEAT,
        **tiling.options,
    )


def _forward(call: ConvCall, tiling: Tiling) -> Tensor:
    batch, length, channels = call.x.shape
    y = torch.empty(batch, length - call.lead, channels, dtype=call.x.dtype, device=call.x.device)
    _launch(conv_forward, call, tiling, length - call.lead, lambda _: (y,))
    return y


def _backward(call: ConvCall, tiling: Tiling, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, the weight and the bias."""
    batch, length, channels = call.x.shape
    width = call.weight.shape[1]
    dx = torch.empty(call.x.shape, dtype=call.x.dtype, device=call.x.device)
    made: list[Tensor] = []

    def arguments(stretches: int) -> tuple[Any, ...]:
        made.append(torch.empty(batch, stretches, width + 1, channels, dtype=torch.float32, device=dx.device))
        return dy, dy.stride(), dx, made[0]

    _launch(conv_backward, call, tiling, length, arguments)
    sums = made[0].sum(dim=(0, 1))
    return dx, sums[:width].t(), sums[width]


def _tuned(call: ConvCall, kind: str, run: Callable[[Tiling], Any]) -> Any:
    batch, length, channels = call.x.shape
    key = (kind, power_of_two(batch), power_of_two(length), channels, call.weight.shape[1], call.x.dtype)
    with on_device(call.x.device):
        return run(tune((*key, call.seq_idx is None), TILINGS, 1, call.x.device, run))


class _TritonConvolution(torch.autograd.Function):
    """Saves its inputs only."""

    @staticmethod
    def forward(ctx: Any, call: ConvCall, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias, call.seq_idx)
        ctx.fixed = (call.activation, call.reverse, call.lead)
        y: Tensor = _tuned(call, "conv forward", lambda tiling: _forward(call, tiling))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, seq_idx = ctx.saved_tensors
        activation, reverse, lead = ctx.fixed
        call = ConvCall(x, weight, bias, activation, seq_idx, reverse, lead)
        with no_autocast(x.device):
            dx, dweight, dbias = _tuned(call, "conv backward", lambda tiling: _backward(call, tiling, dy))
        return None, dx, dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype)


def conv(call: ConvCall) -> Tensor:
    """Run `causal_conv1d`."""
    tensors = (call.x, call.weight, call.bias)
    answers = call.x.shape[1] - call.lead
    if call.x.numel() == 0 or answers == 0:
        return call.x[:, :answers] * 1
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y: Tensor = _TritonConvolution.apply(call, *tensors)
        return y
    y = _tuned(call, "conv forward", lambda tiling: _forward(call, tiling))
    return y
