"""Causal depthwise convolution over packed sequences, and the states it leaves behind.

Shape legend: B batch, L length, D channels, K kernel width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmamba.errors import ShapeError
from vlmamba.ssm import compiled
from vlmamba.ssm.checks import check_device, check_floating, check_integers, check_shape
from vlmamba.ssm.dispatch import run_conv
from vlmamba.ssm.spec import ConvCall, segment_runs


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    return_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel with its own K taps over the current and the K - 1 previous tokens.

    Arithmetic is float32 (float64 for float64 inputs). "Previous" is in scan direction.

    Args:
        x: Input, (B, L, D).
        weight: Taps, (D, K); the last one weighs the current token.
        bias: (D).
        activation: None or "silu".
        seq_idx: (B, L) integers; the history is empty (zeros) wherever neighbouring values differ.
        initial_state: (B, K-1, D), the tokens before the first one in scan direction, oldest first. They
            belong to the first segment. Differentiable.
        reverse: Go from the last token to the first.
        return_state: Whether to return the state after the last token in scan direction.
        backend: Name of a backend; by default the best one that can serve.

    Returns:
        `y` (B, L, D) in x's dtype; with `return_state` the pair of y and the state (B, K-1, D) in x's dtype:
        the last K - 1 tokens of the segment that the last token is in, oldest first, zeros in front where it
        is shorter.

    Raises:
        ShapeError: Shapes or devices do not fit, or the activation is unknown.
        BackendError: The backend asked for is unknown or cannot serve the call.
    """
    name = "causal_conv1d"
    check_shape(name, "x", x, (None, None, None), "(B, L, D)")
    batch, length, channels = x.shape
    check_shape(name, "weight", weight, (channels, None), "(D, K)")
    history = weight.shape[1] - 1
    if history < 0:
        raise ShapeError(
            f"{name}: weight has shape {tuple(weight.shape)}, but (D, K) with K of 1 or more is needed."
        )
    check_shape(name, "bias", bias, (channels,), "(D)")
    check_shape(name, "seq_idx", seq_idx, (batch, length), "(B, L)")
    check_integers(name, "seq_idx", seq_idx)
    check_shape(name, "initial_state", initial_state, (batch, history, channels), "(B, K-1, D)")
    tensors = {"weight": weight, "bias": bias, "initial_state": initial_state}
    check_device(name, x, tensors | {"seq_idx": seq_idx})
    check_floating(name, {"x": x} | tensors)
    if activation not in (None, "silu"):
        raise ShapeError(f"{name}: activation is {activation!r}, but None or 'silu' is needed.")
    extended, ids = _with_history(x, seq_idx, initial_state, reverse)
    lead = extended.shape[1] - length
    run = compiled.conv if torch.compiler.is_compiling() else run_conv
    y = run(ConvCall(extended, weight, bias, activation, ids, reverse, lead), backend)
    if not return_state:
        return y
    last = torch.full((batch,), 0 if reverse else length - 1, device=x.device)
    return y, conv_state_at(
        x, last, history + 1, seq_idx=seq_idx, initial_state=initial_state, reverse=reverse
    )


def conv_state_at(
    x: Tensor,
    positions: Tensor,
    kernel: int,
    *,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:
    """The convolution's state right after one token of each row.

    Args:
        x: Input of the convolution, (B, L, D).
        positions: (B) integer time positions.
        kernel: K.
        seq_idx: As for `causal_conv1d`.
        initial_state: As for `causal_conv1d`.
        reverse: As for `causal_conv1d`.

    Returns:
        (B, K-1, D) in x's dtype: the K - 1 tokens up to and including that one, of its own segment, oldest
        first; zeros in front where the segment is shorter.
    """
    batch, length, _ = x.shape
    history = kernel - 1
    if length == 0 or history == 0:
        return x.new_zeros(batch, history, x.shape[2]) if initial_state is None else initial_state.to(x.dtype)
    extended, ids = _with_history(x, seq_idx, initial_state, reverse)
    lead = extended.shape[1] - length
    offsets = torch.arange(history, device=x.device)
    if reverse:
        index = positions.unsqueeze(1) + (history - 1 - offsets)
    else:
        index = positions.unsqueeze(1) + lead - (history - 1 - offsets)
    inside = (index >= 0) & (index < extended.shape[1])
    index = index.clamp(0, extended.shape[1] - 1)
    rows = torch.arange(batch, device=x.device).unsqueeze(1)
    if ids is not None:
        runs = segment_runs(ids)
        own = runs.gather(1, (positions if reverse else positions + lead).unsqueeze(1))
        inside = inside & (runs.gather(1, index) == own)
    return extended[rows, index].masked_fill(~inside.unsqueeze(-1), 0)


def _with_history(
    x: Tensor, seq_idx: Tensor | None, initial_state: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor | None]:
    """The input and its segment ids with the initial state as tokens in front of it (in scan direction)."""
    if initial_state is None or initial_state.shape[1] == 0:
        return x, seq_idx
    past = initial_state.to(x.dtype)
    pair = (x, past.flip(1)) if reverse else (past, x)
    extended = torch.cat(pair, dim=1)
    if seq_idx is None:
        return extended, None
    edge = (seq_idx[:, -1:] if reverse else seq_idx[:, :1]).expand(-1, past.shape[1])
    return extended, torch.cat((seq_idx, edge) if reverse else (edge, seq_idx), dim=1)
