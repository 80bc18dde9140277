"""Checks of a language model where it is built: cheap, on the model itself, and always on.

Shapes: B batch, L length, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vlmamba.errors import ConfigError
from vlmamba.models.language.families import family_of, require, run_language_model

HALF = 3
"""Tokens of each of the two parts that are run."""

TOLERANCE = 1e-2
"""Relative to the largest hidden state: half precision's rounding stays below it, a missing mask is far above."""


def check_causal(model: Any) -> None:
    """Run two rows that differ in their second half, and compare what their first halves become.

    Args:
        model: A language model with values (nothing is checked on the meta device, nor flash attention on a CPU).

    Raises:
        ConfigError: A later token moved an earlier one's hidden state.
    """
    embeds = _noise(model)
    if embeds is None:
        return
    with _evaluating(model):
        hidden = run_language_model(model, inputs_embeds=embeds).hidden
    moved = _difference(hidden[0, :HALF], hidden[1, :HALF])
    if not moved <= TOLERANCE:
        raise ConfigError(
            f"language model {model.config.model_type!r} sees what comes later: changing the last {HALF} of {2 * HALF} "
            f"tokens moved earlier hidden states by {moved:.1e} of their size (attn_implementation is "
            f"{getattr(model.config, '_attn_implementation', None)!r}), so it would read its answers. Set "
            "model.language.attention to sdpa or eager, or use a causal language model"
        )


def check_packs(model: Any) -> None:
    """Run two samples in one row, and the second alone.

    Args:
        model: As of `check_causal`.

    Raises:
        ConfigError: The family does not pack, or the first sample moved the second's hidden states.
    """
    require(family_of(model).packs, model.config, "packed rows (data.pack_length)")
    embeds = _noise(model)
    if embeds is None:
        return
    row = embeds[:1]
    seq_idx = torch.tensor([[0] * HALF + [1] * HALF], device=row.device, dtype=torch.int32)
    with _evaluating(model):
        packed = run_language_model(model, inputs_embeds=row, seq_idx=seq_idx).hidden[0, HALF:]
        alone = run_language_model(model, inputs_embeds=row[:, HALF:]).hidden[0]
    moved = _difference(packed, alone)
    if not moved <= TOLERANCE:
        raise ConfigError(
            f"language model {model.config.model_type!r} mixes the samples of a packed row: the first of two moved the "
            f"second's hidden states by {moved:.1e} of their size. Set data.pack_length none"
        )


def _noise(model: Any) -> Tensor | None:
    """Two rows (2, 2 HALF, D) of the embeddings' scale with the same first half; None where nothing can be run."""
    weight = model.get_input_embeddings().weight
    flash = "flash" in (getattr(model.config, "_attn_implementation", None) or "")
    if weight.device.type == "meta" or (flash and weight.device.type == "cpu"):
        return None
    generator = torch.Generator().manual_seed(0)
    width = weight.shape[-1]
    first, second, third = (torch.randn(1, HALF, width, generator=generator) for _ in range(3))
    rows = torch.cat([torch.cat([first, second], dim=1), torch.cat([first, third], dim=1)])
    return (rows * weight.detach().float().std().cpu()).to(weight.device, weight.dtype)


def _difference(first: Tensor, second: Tensor) -> float:
    first, second = first.float(), second.float()
    return ((first - second).abs().max() / second.abs().max().clamp(min=1e-30)).item()


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
