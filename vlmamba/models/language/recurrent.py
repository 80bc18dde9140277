"""Recurrent and hybrid causal language models of transformers: exact where transformers is, and refused elsewhere.

Their recurrent layers know nothing of the samples of a packed row, so packing is refused for all of them. What else
they can do was measured (`vlmamba check language`; the table is docs/backbones.md).

Shapes: B batch, L length, T columns in the cache and the input together, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from vlmamba.errors import ShapeError
from vlmamba.models.language.attention import (
    build,
    call_decoder,
    check_cache,
    layer_kinds,
    load,
    padded_position_ids,
    put_cache,
)
from vlmamba.models.language.families import LanguageFamily, LanguageOutput, Verdict
from vlmamba.models.language.head import logits

MEASURED = (
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "granitemoehybrid",
    "jamba",
    "lfm2",
    "mamba2",
    "nemotron_h",
    "olmo_hybrid",
    "qwen3_5_text",
    "qwen3_next",
    "zamba2",
)
"""Model types whose laws hold but for what is refused below."""

ONE_PART: dict[str, str] = {
    "jamba": "transformers starts its Mamba layers anew when several tokens follow a cache; run the prompt in one part"
}
"""Model types that do not continue a cache with several tokens at once, and why."""


class StateCache(DynamicCache):
    """transformers' cache, which also counts its columns: layers without keys and values cannot tell."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.columns = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns seen, the same for all layers."""
        return self.columns

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.columns = 0


def run(
    model: Any,
    *,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cache: Any,
    use_cache: bool,
    output_hidden_states: bool,
) -> LanguageOutput:
    """See `families.run_language_model`."""
    batch, length = inputs_embeds.shape[:2]
    if cache is None and use_cache:
        cache = StateCache(model.config)
    if cache is not None:
        check_cache(model, cache, StateCache)
    past = 0 if cache is None else cache.columns
    if attention_mask is None:
        position_ids = torch.arange(past, past + length, device=inputs_embeds.device).expand(batch, -1)
    else:
        if attention_mask.shape != (batch, past + length):
            raise ShapeError(
                f"attention_mask has shape {tuple(attention_mask.shape)} but {model.config.model_type} needs "
                f"{(batch, past + length)}: {past} cached columns and {length} new ones"
            )
        position_ids = padded_position_ids(attention_mask, length)
        if layer_kinds(model.config) == {"LinearAttentionLayer"}:  # no layer looks at earlier columns
            attention_mask = attention_mask[:, past:]
    found = call_decoder(
        model,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        cache=cache,
        use_cache=use_cache,
        output_hidden_states=output_hidden_states,
    )
    if cache is not None:
        cache.columns += length
    return found


def prepare_cache(model: Any, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    """See `families.prepare_generation_cache`."""
    put_cache(model, generation_config, model_kwargs, StateCache, lambda: StateCache(model.config))


def serves(config: Any) -> Verdict:
    """Only what was measured."""
    if config.model_type in MEASURED:
        return True
    return (
        "its recurrent layers are not known to be exact here (padding, decoding, continuing); use one of "
        f"{', '.join(('mamba', *MEASURED))}, or add a family (vlmamba/models/language/families.py)"
    )


def family(config: Any) -> LanguageFamily:
    """What transformers' recurrent layers can do."""
    return LanguageFamily(
        build=build,
        load=load,
        run=run,
        logits=logits,
        prepare_cache=prepare_cache,
        stateful=True,
        needs_mask_after_prompt=True,
        serves=serves(config),
        packs="its recurrent layers in transformers mix the samples of a row; set data.pack_length none",
        continues=ONE_PART.get(config.model_type, True),
    )
