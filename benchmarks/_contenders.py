"""The scans that are compared: vlmamba's backends, plain loops, and peers that are installed.

Every contender is one function of the same arguments, ``inputs -> y``; what a peer wants in another layout is brought
there before the clock starts, by `Contender.prepare`.

Shapes: B batch, L length, D channels, N state size, K conv kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmamba.ssm import ScanSpec, causal_conv1d, selective_scan
from vlmamba.ssm.registry import BACKENDS, judge

SCAN_INPUTS = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")
CONV_INPUTS = ("x", "weight", "bias")


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
        name: As it stands in the tables.
        run: Inputs -> y, in the contender's own layout.
        channel_major: Whether it wants (B, D, L) for what is (B, L, D) here, and gives y so.
        slow: Whether its time grows with the square of the length; then only its first tokens are checked.
    """

    name: str
    run: Callable[[Mapping[str, Tensor]], Tensor]
    channel_major: bool = False
    slow: bool = False

    def prepare(self, inputs: Mapping[str, Tensor], *, grad: bool) -> dict[str, Tensor]:
        """The inputs in this contender's layout, as leaves."""
        own = {}
        for name, tensor in inputs.items():
            moved = (
                tensor.transpose(1, 2).contiguous() if self.channel_major and tensor.dim() == 3 else tensor
            )
            own[name] = moved.detach().clone().requires_grad_(grad)
        return own

    def results(self, inputs: Mapping[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
        """Its y and all gradients of ``sum(y * weight)``, in the common layout."""
        own = self.prepare(inputs, grad=True)
        y = self.run(own)
        y = y.transpose(1, 2) if self.channel_major else y
        (y.float() * weight.float()).sum().backward()
        found = {"y": y.detach()}
        for name, tensor in own.items():
            assert tensor.grad is not None, f"{self.name} has no gradient for {name}"
            swapped = self.channel_major and tensor.dim() == 3
            found[f"d{name}"] = tensor.grad.transpose(1, 2) if swapped else tensor.grad
        return found


def scan_inputs(
    batch: int, length: int, channels: int, size: int, *, dtype: torch.dtype, device: str, seed: int = 0
) -> dict[str, Tensor]:
    """Inputs as a trained layer sees them: time steps around 0.01 to 0.1, A the negative whole numbers."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    made = {
        "u": noise(batch, length, channels),
        "dt": 0.5 * noise(batch, length, channels),
        "A": -torch.arange(1.0, size + 1).expand(channels, size) * (0.1 * noise(channels, 1)).exp(),
        "B": noise(batch, length, size),
        "C": noise(batch, length, size),
        "D": noise(channels),
        "z": noise(batch, length, channels),
        "dt_bias": noise(channels) - 4.0,
    }
    fp32 = ("A", "D", "dt_bias")
    return {k: v.to(device, torch.float32 if k in fp32 else dtype).contiguous() for k, v in made.items()}


def conv_inputs(
    batch: int, length: int, channels: int, kernel: int, *, dtype: torch.dtype, device: str, seed: int = 0
) -> dict[str, Tensor]:
    """Inputs of the causal convolution."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (batch, length, channels), "weight": (channels, kernel), "bias": (channels,)}
    made = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return {name: tensor.to(device, dtype) for name, tensor in made.items()}


def scan_contenders(spec: ScanSpec) -> list[Contender]:
    """Every backend that serves the call, the plain loop, and the peers that are installed."""
    found = [
        Contender(f"vlmamba {name}", _ours(selective_scan, name))
        for name in BACKENDS.names()
        if judge(BACKENDS.get(name), spec) is True
    ]
    found.append(Contender("plain loop (unbind)", unbind_loop))
    found.append(Contender("transformers", _transformers_scan(), channel_major=True, slow=True))
    if (pscan := _module("mambapy.pscan")) is not None:
        found.append(Contender("mambapy", _mambapy_scan(pscan.pscan)))
    if spec.device == "cuda" and _module("selective_scan_cuda") is not None:
        found.append(Contender("mamba-ssm", _mamba_ssm_scan(), channel_major=True))
    return found


def conv_contenders(spec: ScanSpec) -> list[Contender]:
    """Every backend that has the convolution, and torch's own."""
    found = [
        Contender(f"vlmamba {name}", _ours_conv(name))
        for name in BACKENDS.names()
        if judge(BACKENDS.get(name), spec) is True
    ]
    found.append(Contender("torch conv1d", _torch_conv, channel_major=True))
    if spec.device == "cuda" and (module := _module("causal_conv1d")) is not None:
        found.append(
            Contender(
                "causal-conv1d",
                lambda i: module.causal_conv1d_fn(i["x"], i["weight"], i["bias"], activation="silu"),
                channel_major=True,
            )
        )
    return found


def unbind_loop(inputs: Mapping[str, Tensor]) -> Tensor:
    """The best plain PyTorch loop: time-major, `unbind` (whose backward is linear in L), one matmul for y."""
    u, z = inputs["u"].float(), inputs["z"].float()
    delta = F.softplus(inputs["dt"].float() + inputs["dt_bias"])
    decay = torch.exp(delta.unsqueeze(-1) * inputs["A"])
    driven = (delta * u).unsqueeze(-1) * inputs["B"].float().unsqueeze(2)
    states, state = [], torch.zeros_like(driven[:, 0])
    for a, b in zip(decay.unbind(1), driven.unbind(1), strict=True):
        state = torch.addcmul(b, a, state)
        states.append(state)
    y = torch.matmul(torch.stack(states, dim=1), inputs["C"].float().unsqueeze(-1)).squeeze(-1)
    y = (y + inputs["D"] * u) * F.silu(z)
    return y.to(inputs["u"].dtype)


def linear_transformers_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """A stand-in for transformers' `mamba_selective_scan`, with its arguments, whose loop is linear in L.

    The same arithmetic in the same layout, but the time axis is taken apart once with `unbind`; indexing it at
    every step is what makes the backward of transformers' own loop quadratic.
    """
    dt = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[..., None]
    dt = F.softplus(dt) if delta_softplus else dt
    decay = torch.exp(A[None, :, None, :] * dt[:, :, :, None])
    driven = (dt * hidden_states)[..., None] * B.transpose(1, 2)[:, None].float()
    states, state = [], torch.zeros_like(driven[:, :, 0])
    for a, b in zip(decay.unbind(2), driven.unbind(2), strict=True):
        state = a * state + b
        states.append(state)
    rows = torch.stack(states, dim=1).to(hidden_states.dtype)  # (B, L, D, N)
    y = torch.matmul(rows, C.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)
    y = y if D is None else y + hidden_states * D[None, :, None]
    y = y if z is None else y * F.silu(z)
    return (y, state) if return_last_state else y


def _ours(function: Callable[..., Any], backend: str) -> Callable[[Mapping[str, Tensor]], Tensor]:
    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        y: Tensor = function(*(inputs[name] for name in SCAN_INPUTS), backend=backend)
        return y

    return run


def _ours_conv(backend: str) -> Callable[[Mapping[str, Tensor]], Tensor]:
    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        y = causal_conv1d(*(inputs[name] for name in CONV_INPUTS), activation="silu", backend=backend)
        assert isinstance(y, Tensor)
        return y

    return run


def _torch_conv(inputs: Mapping[str, Tensor]) -> Tensor:
    x, weight = inputs["x"], inputs["weight"]
    kernel = weight.shape[1]
    y = F.conv1d(x, weight.unsqueeze(1), inputs["bias"], padding=kernel - 1, groups=x.shape[1])
    return F.silu(y[..., : x.shape[2]])


def _transformers_scan() -> Callable[[Mapping[str, Tensor]], Tensor]:
    from transformers.models.mamba import modeling_mamba

    def run(i: Mapping[str, Tensor]) -> Tensor:
        y: Tensor = modeling_mamba.mamba_selective_scan(
            i["u"], i["dt"], i["A"], i["B"], i["C"], i["D"], i["z"], i["dt_bias"], delta_softplus=True
        )
        return y

    return run


def _mambapy_scan(pscan: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Mapping[str, Tensor]], Tensor]:
    def run(i: Mapping[str, Tensor]) -> Tensor:
        u = i["u"].float()
        delta = F.softplus(i["dt"].float() + i["dt_bias"])
        decay = torch.exp(delta.unsqueeze(-1) * i["A"])
        driven = (delta * u).unsqueeze(-1) * i["B"].float().unsqueeze(2)
        y = (pscan(decay, driven) @ i["C"].float().unsqueeze(-1)).squeeze(-1)
        return ((y + i["D"] * u) * F.silu(i["z"].float())).to(i["u"].dtype)

    return run


def _mamba_ssm_scan() -> Callable[[Mapping[str, Tensor]], Tensor]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def run(i: Mapping[str, Tensor]) -> Tensor:
        y: Tensor = selective_scan_fn(
            i["u"], i["dt"], i["A"], i["B"], i["C"], i["D"], i["z"], i["dt_bias"], delta_softplus=True
        )
        return y

    return run


def _module(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        return None
