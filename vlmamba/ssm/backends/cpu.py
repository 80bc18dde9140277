"""The native scan for the CPU: `vlmamba/ssm/native`, called through ctypes.

Compiled on first use (`cpu_build`). Results are the same bits in every run and for any number of threads,
which follows `torch.set_num_threads`. Forward keeps the inputs and the state at every 16th token; backward
computes the states again. Half-precision inputs are computed in float32. The convolution is
that of the `torch` backend.

Shape legend: B batch, L length, D channels, N state size, G groups, S asked states.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmamba.ssm.backends import cpu_build, reference
from vlmamba.ssm.backends.torch_conv import conv
from vlmamba.ssm.backends.torch_step import step
from vlmamba.ssm.spec import Backend, ScanCall, ScanSpec, Verdict, no_autocast

_INTEGERS = ("batch", "length", "channels", "size", "groups", "asked", "threads", "softplus", "last")
_INPUTS = ("u", "dt", "z", "A", "B", "C", "D", "bias", "start")
_STRIDES = (
    *("u_row", "u_step", "dt_row", "dt_step", "z_row", "z_step"),
    *("B_row", "B_step", "B_group", "C_row", "C_step", "C_group"),
)
_OUTPUTS = ("change", "reverse", "at", "y", "states", "saved", "work", "dy", "d_states")
_GRADIENTS = ("du", "ddt", "dz", "dA", "dB", "dC", "dD", "dbias", "dstart")


class _Arguments(ctypes.Structure):
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
        self.library = _library()
        self.batch, self.length, self.channels = call.u.shape
        self.arguments = _Arguments(
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


def _prepare(library: ctypes.CDLL) -> str | None:
    """Declare the functions of a library just loaded, and hold a tiny scan against the reference."""
    pointer = ctypes.POINTER(_Arguments)
    for name in ("forward", "backward"):
        function = getattr(library, f"vlmamba_scan_{name}")
        function.argtypes, function.restype = [pointer], None
    library.vlmamba_scan_sizes.argtypes = [pointer, ctypes.POINTER(ctypes.c_int64)]
    library.vlmamba_scan_sizes.restype = None
    library.vlmamba_scan_arguments_size.restype = ctypes.c_int64
    if library.vlmamba_scan_arguments_size() != ctypes.sizeof(_Arguments):
        return "it takes other arguments than this version gives"
    _trial.append(library)
    try:
        return _self_check()
    finally:
        _trial.pop()


_trial: list[ctypes.CDLL] = []


def _self_check() -> str | None:
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float32)

        u, dt, z, B, C = (
            noise(1, 35, 5),
            noise(1, 35, 5),
            noise(1, 35, 5),
            noise(1, 35, 1, 5),
            noise(1, 35, 1, 5),
        )
        A, D, bias, start = -noise(5, 5).exp(), noise(5), noise(5), noise(1, 5, 5)
        tensors = [t.requires_grad_() for t in (u, dt, A, B, C, D, z, bias, start)]
        u, dt, A, B, C, D, z, bias, start = tensors
        seq_idx = (torch.arange(35) > 7).int().unsqueeze(0)
        call = ScanCall(u, dt, A, B, C, D, z, bias, True, seq_idx, start, (True,), None, True)
        results = []
        for function in (scan, reference.scan):
            y, states = function(call)
            assert states is not None
            results.append(
                (y.detach(), states.detach(), *torch.autograd.grad(y.square().sum() + states.sum(), tensors))
            )
    for got, want in zip(*results, strict=True):
        error = ((got - want).abs().max() / want.abs().max()).item()
        if not error < 1e-4:
            return f"relative error {error:.1e} against the reference"
    return None


def _library() -> ctypes.CDLL:
    if _trial:
        return _trial[0]
    library = cpu_build.load(_prepare)
    assert isinstance(library, ctypes.CDLL), library
    return library


def available() -> Verdict:
    """True once the kernel is compiled, loaded and checked; otherwise why it is not."""
    library = cpu_build.load(_prepare)
    return library if isinstance(library, str) else True


def supports(spec: ScanSpec) -> Verdict:
    """CPU tensors in anything but float64."""
    if spec.device != "cpu":
        return f"it runs on the CPU, not on {spec.device}"
    return True if spec.dtype != torch.float64 else "it computes in float32; float64 is served by 'reference'"


BACKEND = Backend(
    name="cpu", priority=20, scan=scan, conv=conv, available=available, supports=supports, step=step
)
