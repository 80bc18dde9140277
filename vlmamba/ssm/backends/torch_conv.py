"""Causal depthwise convolution as K shifted multiply-adds over (B, L, D), in plain torch.

Shape legend: B batch, L length, D channels, K kernel width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmamba.ssm.spec import ConvCall, compute_dtype, segment_runs


def conv(call: ConvCall) -> Tensor:
    """Run `causal_conv1d`."""
    masks = _same_segment(call.seq_idx, call.weight.shape[1], call.reverse)
    y: Tensor = _Convolution.apply(
        call.x, call.weight, call.bias, call.activation == "silu", call.reverse, call.lead, masks
    )
    return y


def _same_segment(seq_idx: Tensor | None, taps: int, reverse: bool) -> list[Tensor] | None:
    """For each shift 1 .. K-1, (B, L - shift) whether the two tokens that far apart are in one segment."""
    if seq_idx is None:
        return None
    runs = segment_runs(seq_idx)
    length = seq_idx.shape[1]
    return [runs[:, min(s, length) :] == runs[:, : max(length - s, 0)] for s in range(1, taps)]


def _shifted(length: int, lead: int, shift: int, reverse: bool) -> tuple[slice, slice, slice]:
    """Where one tap reads and writes.

    Returns:
        Slices of the answers (target), of the input (source), and of the shift's mask.
    """
    if reverse:
        answered = length - lead
        stop = min(answered, length - shift)
        return slice(0, max(stop, 0)), slice(shift, max(stop, 0) + shift), slice(0, max(stop, 0))
    first = max(lead, shift)
    if first >= length:
        return slice(0, 0), slice(0, 0), slice(0, 0)
    return (
        slice(first - lead, length - lead),
        slice(first - shift, length - shift),
        slice(first - shift, None),
    )


def _preactivation(
    x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, lead: int, masks: list[Tensor] | None
) -> Tensor:
    length, taps = x.shape[1], weight.shape[1]
    target, source, _ = _shifted(length, lead, 0, reverse)
    if bias is None:
        y = x[:, source] * weight[:, taps - 1]
    else:
        y = torch.addcmul(bias, x[:, source], weight[:, taps - 1])
    for shift in range(1, taps):
        target, source, masked = _shifted(length, lead, shift, reverse)
        values = x[:, source]
        if masks is not None:
            values = values * masks[shift - 1][:, masked].unsqueeze(-1)
        y[:, target].addcmul_(values, weight[:, taps - 1 - shift])
    return y


class _Convolution(torch.autograd.Function):
    """Saves its inputs only; the pre-activation is computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        silu: bool,
        reverse: bool,
        lead: int,
        masks: list[Tensor] | None,
    ) -> Tensor:
        kind = compute_dtype(x.dtype)
        ctx.save_for_backward(x, weight, bias)
        ctx.silu, ctx.reverse, ctx.lead, ctx.masks = silu, reverse, lead, masks
        taps = weight.to(kind).t().contiguous().t()
        offset = None if bias is None else bias.to(kind)
        y = _preactivation(x.to(kind), taps, offset, reverse, lead, masks)
        return (F.silu(y, inplace=True) if silu else y).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        reverse, lead, masks = ctx.reverse, ctx.lead, ctx.masks
        kind = compute_dtype(x.dtype)
        values = x.to(kind)
        taps = weight.to(kind).t().contiguous().t()
        grad = grad.to(kind)
        if ctx.silu:
            offset = None if bias is None else bias.to(kind)
            y = _preactivation(values, taps, offset, reverse, lead, masks)
            grad = torch.ops.aten.silu_backward(grad, y)
        length, width = values.shape[1], taps.shape[1]
        dx = torch.zeros_like(values) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(taps) if ctx.needs_input_grad[1] else None
        for shift in range(width):
            target, source, masked = _shifted(length, lead, shift, reverse)
            part = grad[:, target]
            if shift and masks is not None:
                part = part * masks[shift - 1][:, masked].unsqueeze(-1)
            if dx is not None:
                dx[:, source].addcmul_(part, taps[:, width - 1 - shift])
            if dweight is not None:
                dweight[:, width - 1 - shift] = (part * values[:, source]).sum(dim=(0, 1))
        dbias = grad.sum(dim=(0, 1)).to(bias.dtype) if bias is not None and ctx.needs_input_grad[2] else None
        return (
            None if dx is None else dx.to(x.dtype),
            None if dweight is None else dweight.to(weight.dtype),
            dbias,
            None,
            None,
            None,
            None,
        )
