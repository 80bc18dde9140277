"""The native decode step: `vlmamba/ssm/native/step.h`, called through ctypes.

Shape legend: B batch, D channels, N state size, G groups.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vlmamba.ssm.backends import torch_step
from vlmamba.ssm.backends.cpu_library import library
from vlmamba.ssm.spec import StepCall

NUMBERS_OF_A_THREAD = 2**16
"""State numbers that are worth a thread of their own."""

_INTEGERS = ("batch", "channels", "size", "groups", "softplus", "threads")
_STRIDES = ("u_row", "dt_row", "z_row", "B_row", "C_row", "B_group", "C_group")
_POINTERS = ("state", "u", "dt", "z", "A", "B", "C", "D", "bias", "y")


class StepArguments(ctypes.Structure):
    """`StepArguments` of native/step.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (*_INTEGERS, *_STRIDES)),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


def _dense(tensor: Tensor) -> Tensor:
    """The tensor in float32 with a dense last dimension, in place where possible."""
    if tensor.dtype != torch.float32:
        tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _flat(tensor: Tensor) -> Tensor:
    """The tensor in float32 and contiguous, in place where possible."""
    return tensor if tensor.dtype == torch.float32 and tensor.is_contiguous() else tensor.float().contiguous()


def step(call: StepCall) -> Tensor:
    """Run `selective_state_update`; steps that need gradients are plain torch."""
    tensors = (call.u, call.dt, call.A, call.B, call.C, call.D, call.z, call.dt_bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return torch_step.step(call)
    batch, channels, size = call.state.shape
    state = _flat(call.state)
    u, dt, B, C, A = _dense(call.u), _dense(call.dt), _dense(call.B), _dense(call.C), _flat(call.A)
    z = None if call.z is None else _dense(call.z)
    D = None if call.D is None else _flat(call.D)
    bias = None if call.dt_bias is None else _flat(call.dt_bias)
    y = torch.empty((batch, channels), dtype=torch.float32)
    threads = 1 + batch * channels * size // NUMBERS_OF_A_THREAD
    arguments = StepArguments(
        *(batch, channels, size, B.shape[1], call.dt_softplus, min(threads, torch.get_num_threads())),
        *(u.stride(0), dt.stride(0), 0 if z is None else z.stride(0)),
        *(B.stride(0), C.stride(0), B.stride(1), C.stride(1)),
        *(state.data_ptr(), u.data_ptr(), dt.data_ptr(), None if z is None else z.data_ptr()),
        *(A.data_ptr(), B.data_ptr(), C.data_ptr(), None if D is None else D.data_ptr()),
        *(None if bias is None else bias.data_ptr(), y.data_ptr()),
    )
    library().vlmamba_step(ctypes.byref(arguments))
    if state is not call.state:
        call.state.copy_(state)
    return y if call.u.dtype == torch.float32 else y.to(call.u.dtype)
