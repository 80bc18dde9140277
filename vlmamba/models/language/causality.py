"""A check that is always on: no position of a language model may see a later one.

Shapes: B batch, L length, D model width.
"""

from __future__ import annotations

from typing import Any

import torch

from vlmamba.errors import ConfigError
from vlmamba.models.language.families import run_language_model

LENGTH = 6
TOLERANCE = 1e-2
"""Relative to the largest hidden state: half precision's rounding stays below it, a missing mask is far above."""


def check_causal(model: Any) -> None:
    """Run two rows of six vectors that differ in their second half, and compare what their first halves become.

    Args:
        model: A language model with values (nothing is checked on the meta device).

    Raises:
        ConfigError: A later token moved an earlier one's hidden state.
    """
    weight = model.get_input_embeddings().weight
    if weight.device.type == "meta":
        return
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, LENGTH, model.config.hidden_size, generator=generator).repeat(2, 1, 1)
    rows[1, LENGTH // 2 :] = torch.randn(LENGTH // 2, model.config.hidden_size, generator=generator)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            rows = rows.to(weight.device, weight.dtype) * weight.float().std().to(weight.dtype)
            hidden = run_language_model(model, inputs_embeds=rows).hidden
    finally:
        model.train(training)
    first, second = hidden[:, : LENGTH // 2].float()
    moved = ((first - second).abs().max() / hidden.float().abs().max().clamp(min=1e-30)).item()
    if not moved <= TOLERANCE:
        implementation = getattr(model.config, "_attn_implementation", None)
        raise ConfigError(
            f"language model {model.config.model_type!r} sees what comes later: changing the last {LENGTH // 2} of "
            f"{LENGTH} tokens moved earlier hidden states by {moved:.1e} of their size (attn_implementation is "
            f"{implementation!r}); a model that sees its answers learns nothing from them. Set "
            "model.language.attention to sdpa or eager, or use a causal language model"
        )
