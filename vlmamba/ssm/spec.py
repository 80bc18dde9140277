"""What a state-space call looks like to a backend.

Shape legend: B batch, L length, D channels, N state size, G groups, K conv kernel, S asked states.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Verdict = bool | str
"""True, or the reason why not, in words for the user."""


@dataclass(frozen=True, slots=True)
class ScanSpec:
    """The facts of one call, without its tensors: what backends are asked about.

    Attributes:
        op: "scan" (`selective_scan`), "conv" (`causal_conv1d`) or "step" (`selective_state_update`).
        device: Device type ("cpu", "cuda", ...).
        dtype: Dtype of the main input.
        batch: B.
        length: L (1 for a step).
        channels: D.
        state_size: N for a scan or a step, the kernel width K for a conv.
        groups: G (1 for a conv).
        features: Names of what the call uses beyond the plain operation, out of "D", "z", "dt_bias",
            "seq_idx", "initial_state", "reverse", "group_reverse", "state_at", "last_state", "activation".
        needs_grad: Whether a gradient will be asked for.
    """

    op: Literal["scan", "conv", "step"] = "scan"
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    batch: int = 1
    length: int = 1
    channels: int = 1
    state_size: int = 16
    groups: int = 1
    features: frozenset[str] = field(default_factory=frozenset)
    needs_grad: bool = False

    def describe(self) -> str:
        """One line for logs and error messages."""
        features = "+".join(sorted(self.features)) or "plain"
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"B={self.batch} L={self.length} D={self.channels}"
        sizes += f" N={self.state_size} G={self.groups}" if self.op != "conv" else f" K={self.state_size}"
        return f"{self.op} {self.device} {dtype} {sizes} {features}{' with grad' if self.needs_grad else ''}"


@dataclass(frozen=True, slots=True)
class ScanCall:
    """The checked arguments of one `selective_scan`, in the one form every backend reads.

    Attributes:
        u: (B, L, D), as are `dt` and `z`.
        A: (D, N).
        B: (B, L, G, N), as is `C`.
        D: (D), as is `dt_bias`.
        seq_idx: (B, L) integers or None.
        initial_state: (B, D, N) in the state's dtype or None.
        reverse: One bool per group.
        state_at: (B, S) int64 positions or None.
        last_state: Whether the state after the last token is wanted (never together with `state_at`).
    """

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    dt_softplus: bool
    seq_idx: Tensor | None
    initial_state: Tensor | None
    reverse: tuple[bool, ...]
    state_at: Tensor | None
    last_state: bool


@dataclass(frozen=True, slots=True)
class ConvCall:
    """The checked arguments of one `causal_conv1d`.

    Attributes:
        x: (B, L, D); when `lead` > 0 the first (in scan direction) `lead` tokens are history: read, not
            answered.
        weight: (D, K).
        bias: (D) or None.
        activation: None or "silu".
        seq_idx: (B, L) integers over all tokens of `x`, or None.
        reverse: Whether the scan direction is from the last token to the first.
        lead: Number of history tokens, 0 or K - 1.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: str | None
    seq_idx: Tensor | None
    reverse: bool
    lead: int


@dataclass(frozen=True, slots=True)
class StepCall:
    """The checked arguments of one `selective_state_update`.

    Attributes:
        state: (B, D, N), overwritten in place; of any floating dtype and strides.
        u: (B, D), as are `dt` and `z`.
        A: (D, N).
        B: (B, G, N), as is `C`.
        D: (D), as is `dt_bias`.
    """

    state: Tensor
    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    dt_softplus: bool


def _always(_: ScanSpec | None = None) -> Verdict:
    return True


@dataclass(frozen=True, slots=True)
class Backend:
    """One implementation of the operations.

    Attributes:
        name: Exact name, as given to `backend=`.
        priority: Higher is preferred among the backends that can serve a call.
        available: Says whether it can run on this machine at all: True, or the reason why not.
        supports: Says whether it serves a call: True, or the reason why not. Asked once for each kind of
            call, so the answer may depend on nothing but the spec.
        scan: Runs a scan: (y, states); states are (B, S, D, N), (B, D, N) or None, as the call asks.
        conv: Runs a causal convolution over (B, L, D), or None where the backend has none.
        step: Runs one decode step: overwrites `state` and returns y (B, D) in u's dtype. Or None.
    """

    name: str
    priority: int
    scan: Callable[[ScanCall], tuple[Tensor, Tensor | None]]
    conv: Callable[[ConvCall], Tensor] | None = None
    available: Callable[[], Verdict] = _always
    supports: Callable[[ScanSpec], Verdict] = _always
    step: Callable[[StepCall], Tensor] | None = None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and arithmetic: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_NOTHING = nullcontext()


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which mixed precision is off; the operations choose their own dtypes."""
    kind = device.type
    if not torch.amp.autocast_mode.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return _NOTHING
    return torch.autocast(kind, enabled=False)


def segment_starts(seq_idx: Tensor, *, reverse: bool = False) -> Tensor:
    """Where the state restarts: (B, L) bool, True at the first token of each segment but the first one.

    "First" is in scan direction. The first segment is left out since `initial_state` belongs to it.
    """
    starts = torch.zeros_like(seq_idx, dtype=torch.bool)
    change = seq_idx[:, 1:] != seq_idx[:, :-1]
    if reverse:
        starts[:, :-1] = change
    else:
        starts[:, 1:] = change
    return starts


def segment_runs(seq_idx: Tensor) -> Tensor:
    """(B, L) int64 run numbers: two tokens are in one segment exactly when their run numbers are equal.

    The ids themselves do not say so: an id that comes back after another one starts a new segment.
    """
    return segment_starts(seq_idx).cumsum(dim=1)
