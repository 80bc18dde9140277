"""The native scan: `vlmamba/ssm/native`, called through ctypes.

Forward keeps the inputs and the state at every 16th token; backward computes the states again.

Shape legend: B batch, L length, D channels, N state size, G groups, S asked states.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmamba.ssm.backends.cpu_library import library
from vlmamba.ssm.spec import ScanCall, no_autocast

_INTEGERS = ("batch", "length", "channels", "size", "groups", "asked", "threads", "softplus", "last")
_INPUTS = ("u", "dt", "z", "A", "B", "C", "D", "bias", "start")
_STRIDES = (
    *("u_row", "u_step", "dt_row", "dt_step", "z_row", "z_step"),
    *("B_row", "B_step", "B_group", "C_row", "C_step", "C_group"),
)
_OUTPUTS = ("change", "reverse", "at", "y", "states", "saved", "work", "dy", "d_states")
_GRADIENTS = ("du", "ddt", "dz", "dA", "dB", "dC", "dD", "dbias", "dstart")


class ScanArguments(ctypes.Structure):
    """`Arguments` of native/common.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_void_p) for name in _INPUTS),
        *((name, ctypes.c_int64) for name in _STRIDES),
        *((name, ctypes.c_void_p) for name in _OUTPUTS),
        ("dy_row", ctypes.c_int64),
        ("dy_step", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in _GRADIENTS),
    ]


class _Kernel:
    """One call as the library sees it; holds every tensor whose memory the library is told of."""

    def __init__(self, call: ScanCall) -> None:
        self.library = library()
        self.batch, self.length, self.channels = call.u.shape
        self.arguments = ScanArguments(
            batch=self.batch,
            length=self.length,
            channels=self.channels,
            size=call.A.shape[1],
            groups=call.B.shape[2],
            asked=0 if call.state_at is None else call.state_at.shape[1],
            threads=torch.get_num_threads(),
            softplus=call.dt_softplus,
            last=call.last_state,
        )
        self.held: list[Tensor] = []
        for name, tensor in (("u", call.u), ("dt", call.dt), ("z", call.z), ("B", call.B), ("C", call.C)):
            self.read(name, tensor, ("row", "step", "group"))
        for name, tensor in (("A", call.A), ("D", call.D), ("bias", call.dt_bias)):
            self.give(name, None if tensor is None else tensor.detach().float().contiguous())
        start = call.initial_state
        self.give("start", None if start is None else start.detach().contiguous())
        self.give("at", None if call.state_at is None else call.state_at.contiguous())
        self.give("reverse", torch.tensor(call.reverse, dtype=torch.uint8))
        if call.seq_idx is not None:
            change = torch.zeros(call.seq_idx.shape, dtype=torch.bool)
            torch.ne(call.seq_idx[:, 1:], call.seq_idx[:, :-1], out=change[:, 1:])
            self.give("change", change)
        sizes = (ctypes.c_int64 * 3)()
        self.library.vlmamba_scan_sizes(ctypes.byref(self.arguments), sizes)
        self.saved_size, self.forward_size, self.backward_size = sizes

    def give(self, name: str, tensor: Tensor | None) -> Tensor | None:
        """Tell the library where a dense tensor is."""
        if tensor is not None:
            self.held.append(tensor)
            setattr(self.arguments, name, tensor.data_ptr())
        return tensor

    def read(self, name: str, tensor: Tensor | None, strides: tuple[str, ...]) -> None:
        """Tell the library where an input is that may be a view; its last dimension is made dense."""
        if tensor is None:
            return
        tensor = tensor.detach().float()
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            tensor = tensor.contiguous()
        self.give(name, tensor)
        for stride, value in zip(strides, tensor.stride()[:-1], strict=False):
            setattr(self.arguments, f"{name}_{stride}", value)

    def new(self, name: str, *shape: int) -> Tensor:
        """A tensor for the library to fill."""
        tensor = torch.empty(shape, dtype=torch.float32)
        self.give(name, tensor)
        return tensor


def _forward(call: ScanCall, *, save: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    kernel = _Kernel(call)
    y = kernel.new("y", *call.u.shape)
    states = saved = None
    if call.state_at is not None or call.last_state:
        places = () if call.state_at is None else (call.state_at.shape[1],)
        states = kernel.new("states", kernel.batch, *places, *call.A.shape)
    if save:
        saved = kernel.new("saved", kernel.saved_size)
    kernel.new("work", kernel.forward_size)
    kernel.library.vlmamba_scan_forward(ctypes.byref(kernel.arguments))
    return y.to(call.u.dtype), states, saved


def _backward(
    call: ScanCall, saved: Tensor, dy: Tensor | None, d_states: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients in the order of `_tensors`, in float32."""
    kernel = _Kernel(call)
    kernel.give("saved", saved)
    kernel.read("dy", dy, ("row", "step"))
    kernel.give("d_states", None if d_states is None else d_states.float().contiguous())
    du, ddt = (kernel.new(name, *call.u.shape) for name in ("du", "ddt"))
    dz = None if call.z is None else kernel.new("dz", *call.u.shape)
    dA = kernel.new("dA", *call.A.shape)
    dB, dC = (kernel.new(name, *call.B.shape) for name in ("dB", "dC"))
    dD = None if call.D is None else kernel.new("dD", kernel.channels)
    dbias = None if call.dt_bias is None else kernel.new("dbias", kernel.channels)
    start = call.initial_state
    dstart = None if start is None else kernel.new("dstart", *start.shape)
    kernel.new("work", kernel.backward_size)
    kernel.library.vlmamba_scan_backward(ctypes.byref(kernel.arguments))
    return du, ddt, dA, dB, dC, dD, dz, dbias, dstart


def _tensors(call: ScanCall) -> tuple[Tensor | None, ...]:
    """The differentiable arguments, in the order of `ScanCall`'s first fields."""
    return (call.u, call.dt, call.A, call.B, call.C, call.D, call.z, call.dt_bias, call.initial_state)


class _NativeScan(torch.autograd.Function):
    """`scan` with gradients for every floating-point argument."""

    @staticmethod
    def forward(ctx: Any, call: ScanCall, *tensors: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y, states, saved = _forward(call, save=True)
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
            grads = _backward(call, saved, dy, d_states)
        pairs = zip(grads, tensors, strict=True)
        return None, *(None if g is None or t is None else g.to(t.dtype) for g, t in pairs)


def scan(call: ScanCall) -> tuple[Tensor, Tensor | None]:
    """Run `selective_scan`."""
    tensors = _tensors(call)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y, states = _NativeScan.apply(call, *tensors)
        return y, states
    y, states, _ = _forward(call, save=False)
    return y, states
