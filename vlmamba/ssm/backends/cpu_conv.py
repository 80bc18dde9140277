"""The native causal convolution: `vlmamba/ssm/native/conv.h`, called through ctypes.

Saves its inputs only; backward computes the values before the activation again.

Shape legend: B batch, L length, D channels, K kernel width.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmamba.ssm.backends import torch_conv
from vlmamba.ssm.backends.cpu_library import library
from vlmamba.ssm.spec import ConvCall

MOST_TAPS = 16
"""K of the native code; wider kernels go to plain torch."""

_INTEGERS = ("batch", "length", "channels", "taps", "silu", "reverse", "lead", "threads")
_STRIDES = ("x_row", "x_step", "dy_row", "dy_step")
_POINTERS = ("x", "weight", "bias", "change", "dy", "y", "dx", "dweight", "dbias", "work")


class ConvArguments(ctypes.Structure):
    """`ConvArguments` of native/conv.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (*_INTEGERS, *_STRIDES)),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor in float32 with a dense last dimension, in place where possible."""
    tensor = tensor.detach().float()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _arguments(call: ConvCall) -> tuple[ConvArguments, list[Tensor]]:
    """The call as the library sees it, and the tensors whose memory it is told of."""
    batch, length, channels = call.x.shape
    x = dense_rows(call.x)
    weight = call.weight.detach().float().t().flip(0).contiguous()
    arguments = ConvArguments(
        batch=batch,
        length=length,
        channels=channels,
        taps=weight.shape[0],
        silu=call.activation == "silu",
        reverse=call.reverse,
        lead=call.lead,
        threads=torch.get_num_threads(),
        x_row=x.stride(0),
        x_step=x.stride(1),
        x=x.data_ptr(),
        weight=weight.data_ptr(),
    )
    held = [x, weight]
    if call.bias is not None:
        held.append(call.bias.detach().float().contiguous())
        arguments.bias = held[-1].data_ptr()
    if call.seq_idx is not None:
        change = torch.zeros(call.seq_idx.shape, dtype=torch.bool)
        torch.ne(call.seq_idx[:, 1:], call.seq_idx[:, :-1], out=change[:, 1:])
        held.append(change)
        arguments.change = change.data_ptr()
    return arguments, held


def forward(call: ConvCall) -> Tensor:
    """The output (B, L - lead, D), without gradients."""
    arguments, held = _arguments(call)
    batch, length, channels = call.x.shape
    y = torch.empty(batch, max(length - call.lead, 0), channels, dtype=torch.float32)
    arguments.y = y.data_ptr()
    library().vlmamba_conv_forward(ctypes.byref(arguments))
    del held
    return y.to(call.x.dtype)


def backward(call: ConvCall, dy: Tensor, *, wants_x: bool = True) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of x (or None), weight and bias, in float32."""
    arguments, held = _arguments(call)
    batch, length, channels = call.x.shape
    taps = call.weight.shape[1]
    dy = dense_rows(dy)
    arguments.dy, arguments.dy_row, arguments.dy_step = dy.data_ptr(), dy.stride(0), dy.stride(1)
    dx = torch.empty(batch, length, channels, dtype=torch.float32) if wants_x else None
    dweight = torch.empty(taps, channels, dtype=torch.float32)
    dbias = torch.empty(channels, dtype=torch.float32)
    arguments.dx = None if dx is None else dx.data_ptr()
    arguments.dweight, arguments.dbias = dweight.data_ptr(), dbias.data_ptr()
    work = torch.empty(library().vlmamba_conv_work(ctypes.byref(arguments)), dtype=torch.float32)
    arguments.work = work.data_ptr()
    library().vlmamba_conv_backward(ctypes.byref(arguments))
    del held
    return dx, dweight.flip(0).t(), dbias


class _NativeConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: ConvCall, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias, call.seq_idx)
        ctx.fixed = (call.activation, call.reverse, call.lead)
        return forward(call)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, seq_idx = ctx.saved_tensors
        activation, reverse, lead = ctx.fixed
        call = ConvCall(x, weight, bias, activation, seq_idx, reverse, lead)
        dx, dweight, dbias = backward(call, dy, wants_x=ctx.needs_input_grad[1])
        return (
            None,
            None if dx is None else dx.to(x.dtype),
            dweight.to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
        )


def conv(call: ConvCall) -> Tensor:
    """Run `causal_conv1d`."""
    if call.weight.shape[1] > MOST_TAPS:
        return torch_conv.conv(call)
    tensors = (call.x, call.weight, call.bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y: Tensor = _NativeConvolution.apply(call, *tensors)
        return y
    return forward(call)
