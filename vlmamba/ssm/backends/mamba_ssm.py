"""The kernels of the packages mamba-ssm and causal-conv1d, or of Hugging Face's `kernels`, behind our contract.

They know neither packing nor direction, so both are brought to them here:

- Segments. Where one starts, delta is set to 2^64 and u to u delta / 2^64: the decay exp(delta A) becomes zero,
  and the input delta u stays what it is. No token is added. What the skip D u lacks there is added afterwards.
- Directions. Groups that run backwards are turned around, so that all groups go through one launch.

They have no state to start from, no gradient of the last state and no states in between: such calls are
refused. The kernels want (B, D, L): inputs are copied into that layout.

Whether a package imports says nothing about its kernels (mamba-ssm installs without those of Mamba-1 by
default), so each function is tried once on a few numbers. With `kernels` installed, VLMAMBA_SSM_KERNELS names
the repository to load from (1 is kernels-community/mamba-ssm); without it nothing is loaded from there, since
that may reach the network.

Shape legend: B batch, L length, D channels, N state size, G groups, K conv kernel.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmamba.ssm.backends.torch_chunked import scan as scan_empty
from vlmamba.ssm.spec import (
    Backend,
    ConvCall,
    ScanCall,
    ScanSpec,
    StepCall,
    Verdict,
    segment_runs,
    segment_starts,
)

DEVICE = "cuda"
KERNELS_VARIABLE = "VLMAMBA_SSM_KERNELS"
KERNELS_REPOSITORY = "kernels-community/mamba-ssm"
RESTART = 2.0**64
LARGEST_STATE = 256
MOST_CHANNELS = 65535
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MODULES = {
    "scan": ("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"),
    "conv": ("causal_conv1d", "causal_conv1d_fn"),
    "step": ("mamba_ssm.ops.triton.selective_state_update", "selective_state_update"),
}


@dataclass(frozen=True, slots=True)
class _Found:
    """What serves one operation: a function, or the reason why there is none."""

    function: Callable[..., Any] | None
    reason: str = ""


def scan(call: ScanCall) -> tuple[Tensor, Tensor | None]:
    """Run `selective_scan`."""
    if call.u.numel() == 0:
        return scan_empty(call)
    u, dt, z = (
        None if t is None else _turned(t.transpose(1, 2), call.reverse) for t in (call.u, call.dt, call.z)
    )
    assert u is not None and dt is not None
    B, C = (_turned_groups(t.to(u.dtype).permute(0, 2, 3, 1), call.reverse) for t in (call.B, call.C))
    D, bias = (None if t is None else t.float().contiguous() for t in (call.D, call.dt_bias))
    starts = _starts(call)
    inputs = u
    if starts is not None:
        inputs, dt = _restarted(u, dt, bias, call.dt_softplus, starts)
    found = _function("scan")(
        inputs.contiguous(),
        dt.contiguous(),
        call.A.float().contiguous(),
        B.contiguous(),
        C.contiguous(),
        D,
        None if z is None else z.contiguous(),
        bias,
        call.dt_softplus,
        call.last_state,
    )
    y, last = found if call.last_state else (found, None)
    if starts is not None and D is not None:
        lacking = D.unsqueeze(1) * (u.float() - inputs.float())
        if z is not None:
            lacking = lacking * F.silu(z.float())
        y = torch.where(starts, (y.float() + lacking).to(y.dtype), y)
    return _turned(y, call.reverse).transpose(1, 2).contiguous(), last


def _restarted(
    u: Tensor, dt: Tensor, bias: Tensor | None, softplus: bool, starts: Tensor
) -> tuple[Tensor, Tensor]:
    """The u and dt, (B, D, L), with which the kernel forgets its state at `starts`, (B, D or 1, L)."""
    delta = dt.float() if bias is None else dt.float() + bias.unsqueeze(1)
    delta = F.softplus(delta) if softplus else delta
    scaled = (u.float() * (delta / RESTART)).to(u.dtype)
    return torch.where(starts, scaled, u), torch.where(starts, torch.full_like(dt, RESTART), dt)


def _starts(call: ScanCall) -> Tensor | None:
    """Where segments start in the kernel's time, (B, 1, L) or (B, D, L)."""
    if call.seq_idx is None:
        return None
    by_direction = {flag: segment_starts(call.seq_idx, reverse=flag) for flag in set(call.reverse)}
    by_direction = {flag: starts.flip(1) if flag else starts for flag, starts in by_direction.items()}
    if len(by_direction) == 1:
        return by_direction[call.reverse[0]].unsqueeze(1)
    width = call.u.shape[2] // len(call.reverse)
    return torch.stack([by_direction[flag] for flag in call.reverse], dim=1).repeat_interleave(width, dim=1)


def _turned(tensor: Tensor, reverse: tuple[bool, ...]) -> Tensor:
    """(B, D, L) with the groups that run backwards turned around."""
    if not any(reverse):
        return tensor
    if all(reverse):
        return tensor.flip(2)
    parts = tensor.chunk(len(reverse), dim=1)
    return torch.cat(
        [part.flip(2) if flag else part for part, flag in zip(parts, reverse, strict=True)], dim=1
    )


def _turned_groups(tensor: Tensor, reverse: tuple[bool, ...]) -> Tensor:
    """As `_turned`, for (B, G, N, L)."""
    return _turned(tensor.flatten(1, 2), reverse).unflatten(1, tensor.shape[1:3])


def conv(call: ConvCall) -> Tensor:
    """Run `causal_conv1d`."""
    x = call.x.flip(1) if call.reverse else call.x
    answers = x.shape[1] - call.lead
    if x.numel() == 0 or answers == 0:
        return call.x[:, :answers] * 1
    if x.stride(2) != 1 or x.stride(0) % 8 or x.stride(1) % 8:
        x = x.contiguous()
    runs = None
    if call.seq_idx is not None:
        ids = call.seq_idx.flip(1) if call.reverse else call.seq_idx
        runs = segment_runs(ids).int()  # the kernel takes equal ids for one segment, wherever they are
    channels_last = x.shape[2] % 8 == 0
    inputs = x.transpose(1, 2)
    if not channels_last:  # clone, not contiguous: that leaves the strides of a single token as they are
        inputs = inputs.clone(memory_format=torch.contiguous_format)
    y = _function("conv")(
        inputs, call.weight.contiguous(), call.bias, seq_idx=runs, activation=call.activation
    )
    y = y.transpose(1, 2)[:, call.lead :]
    return y.flip(1) if call.reverse else y


def step(call: StepCall) -> Tensor:
    """Run `selective_state_update`, without gradients; groups are the kernel's heads."""
    groups = call.B.shape[1]
    u, dt, state = (t.unflatten(1, (groups, -1)) for t in (call.u, call.dt, call.state))
    z = None if call.z is None else call.z.unflatten(1, (groups, -1))
    D, bias = (None if t is None else t.unflatten(0, (groups, -1)) for t in (call.D, call.dt_bias))
    A = call.A.unflatten(0, (groups, -1))
    y = _function("step")(state, u, dt, A, call.B, call.C, D, z=z, dt_bias=bias, dt_softplus=call.dt_softplus)
    return y.flatten(1, 2)


def _function(op: str) -> Callable[..., Any]:
    function = _find(op).function
    assert function is not None, op
    return function


@functools.cache
def _find(op: str) -> _Found:
    """The function that serves an operation, tried on a few numbers."""
    reasons = []
    for source in (_from_package, _from_kernels):
        try:
            function = source(op)
            if function is None:
                continue
            _try(op, function)
            return _Found(function)
        except Exception as error:  # noqa: BLE001  (packages built for another torch raise whatever they like)
            line = (str(error).strip().splitlines() or [""])[-1]
            reasons.append(f"{source.__doc__}: {type(error).__name__}: {line[:200]}")
    return _Found(None, "; ".join(reasons))


def _from_package(op: str) -> Callable[..., Any] | None:
    """installed package"""  # noqa: D403
    module, name = _MODULES[op]
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def _from_kernels(op: str) -> Callable[..., Any] | None:
    """Hugging Face kernels"""
    repository = os.environ.get(KERNELS_VARIABLE, "0")
    if repository.lower() in ("", "0", "false", "no"):
        return None
    if repository.lower() in ("1", "true", "yes"):
        repository = KERNELS_REPOSITORY
    kernel = importlib.import_module("kernels").get_kernel(repository)
    function: Callable[..., Any] = getattr(kernel, _MODULES[op][1])
    return function


def _try(op: str, function: Callable[..., Any]) -> None:
    """Call a function on a few ones.

    Raises:
        RuntimeError: It answers something else than it should.
    """
    with torch.no_grad():
        ones = torch.ones(1, 8, 8, device=DEVICE)
        if op == "scan":
            got = function(ones, ones, -ones[0], ones.unsqueeze(1), ones.unsqueeze(1))[0, 0, :1]
            want = 8.0
        elif op == "conv":
            got = function(ones.transpose(1, 2), ones[0, :, :4].contiguous(), None)[0, 0, 3:4]
            want = 4.0
        else:
            state = torch.zeros_like(ones)
            got = function(state, ones[0, :1], ones[0, :1], -ones[0], ones[0, :1], ones[0, :1])[0, :1]
            want = 8.0
        if not torch.allclose(got.cpu(), torch.tensor([want])):
            raise RuntimeError(f"it answers {got.item()} where {want} is right")


def available() -> Verdict:
    """True when at least one of the kernels works here; otherwise why none does."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    found = [_find(op) for op in _MODULES]
    if any(one.function is not None for one in found):
        return True
    return f"no kernel works ({found[0].reason})"


def supports(spec: ScanSpec) -> Verdict:
    """What the kernels serve as they are, and what can be brought to them."""
    if spec.device != DEVICE:
        return f"it runs on {DEVICE}, not on {spec.device}"
    if spec.dtype not in _DTYPES:
        name = str(spec.dtype).removeprefix("torch.")
        return f"it computes in float32; {name} is served by 'reference'"
    found = _find(spec.op)
    if found.function is None:
        return f"its kernel does not work here ({found.reason})"
    return {"scan": _supports_scan, "conv": _supports_conv, "step": _supports_step}[spec.op](spec)


def _supports_scan(spec: ScanSpec) -> Verdict:
    if "initial_state" in spec.features:
        return "its kernel cannot start from a state"
    if "state_at" in spec.features:
        return "its kernel answers no states but the last"
    if "last_state" in spec.features and spec.needs_grad:
        return "its kernel has no gradient of the last state"
    if "seq_idx" in spec.features and spec.dtype == torch.float16:
        return "segments need numbers that float16 does not hold"
    if spec.state_size > LARGEST_STATE:
        return f"its kernel has at most {LARGEST_STATE} states, not {spec.state_size}"
    if spec.channels > MOST_CHANNELS:
        return f"its kernel has at most {MOST_CHANNELS} channels, not {spec.channels}"
    return True


def _supports_conv(spec: ScanSpec) -> Verdict:
    if not 2 <= spec.state_size <= 4:
        return f"its kernel has 2 to 4 taps, not {spec.state_size}"
    if "seq_idx" in spec.features and spec.channels % 8:
        return f"with segments its kernel needs a multiple of 8 channels, not {spec.channels}"
    return True


def _supports_step(spec: ScanSpec) -> Verdict:
    return "its decode step has no gradient" if spec.needs_grad else True


BACKEND = Backend(
    name="mamba_ssm",
    priority=30,
    scan=scan,
    conv=conv,
    step=step,
    available=available,
    supports=supports,
)
