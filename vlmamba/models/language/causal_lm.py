"""Any causal language model of transformers behind the interface of `families.py`: the baseline for Mamba.

Shapes: B batch, L length, T columns in the cache and the input together, D model width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmamba.errors import ConfigError, ShapeError
from vlmamba.models.language.families import LanguageFamily


def build(config: Any) -> nn.Module:
    """A model with random weights from its config."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def load(path: str | Path, dtype: torch.dtype | str | None = None, **options: Any) -> nn.Module:
    """A model with its weights; every key and shape must fit.

    Raises:
        CheckpointError: Missing or unexpected keys, other shapes, or a pickle that holds more than weights.
    """
    from transformers import AutoModelForCausalLM

    from vlmamba.models.language.loading import load_strictly

    return load_strictly(AutoModelForCausalLM, path, dtype=dtype, **options)


def packed_attention_mask(
    seq_idx: torch.Tensor, dtype: torch.dtype, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Additive causal mask in which the samples of a packed row do not see each other.

    Args:
        seq_idx: (B, L) sample index.
        dtype: Dtype of the scores the mask is added to.
        attention_mask: (B, L), 0 at padding, which nobody sees (but itself).

    Returns:
        (B, 1, L, L), 0 where attended and the dtype's lowest value elsewhere.
    """
    length = seq_idx.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=seq_idx.device).tril()
    seen = (seq_idx[:, :, None] == seq_idx[:, None, :]) & earlier
    if attention_mask is not None:
        itself = torch.eye(length, dtype=torch.bool, device=seq_idx.device)
        seen = seen & ((attention_mask != 0)[:, None, :] | itself)
    mask = torch.zeros(seen.shape, dtype=dtype, device=seq_idx.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def packed_position_ids(seq_idx: torch.Tensor) -> torch.Tensor:
    """Positions (B, L) that restart at 0 where `seq_idx` changes."""
    columns = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand_as(seq_idx)
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return columns - torch.where(starts, columns, 0).cummax(dim=1).values


def padded_position_ids(attention_mask: torch.Tensor, length: int) -> torch.Tensor:
    """Positions (B, L) of the last `length` columns that count real tokens only."""
    return ((attention_mask != 0).long().cumsum(dim=1) - 1).clamp(min=0)[:, -length:]


def run(
    model: Any,
    *,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    past_key_values: Any,
    use_cache: bool,
) -> tuple[torch.Tensor, Any]:
    """See `families.run_language_model`."""
    batch, length = inputs_embeds.shape[:2]
    past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    position_ids = None
    if seq_idx is not None:
        _check_packed(model, seq_idx, (batch, length), past)
        position_ids = packed_position_ids(seq_idx)
        attention_mask = packed_attention_mask(seq_idx, inputs_embeds.dtype, attention_mask)
    elif attention_mask is not None:
        if attention_mask.shape != (batch, past + length):
            raise ShapeError(
                f"attention_mask has shape {tuple(attention_mask.shape)} but {model.config.model_type} needs "
                f"{(batch, past + length)}: {past} cached columns and {length} new ones"
            )
        position_ids = padded_position_ids(attention_mask, length)
    output = model.get_decoder()(
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
    )
    return output.last_hidden_state, output.past_key_values if use_cache else None


def _check_packed(model: Any, seq_idx: torch.Tensor, shape: tuple[int, int], past: int) -> None:
    if seq_idx.shape != shape:
        raise ShapeError(f"seq_idx has shape {tuple(seq_idx.shape)} but the input is {shape}")
    if past:
        raise ShapeError(
            f"seq_idx was given with a cache of {past} tokens; a packed row starts without a cache, "
            "so pass seq_idx or past_key_values, not both"
        )
    attention = getattr(model.config, "_attn_implementation", None) or ""
    if "flash" in attention:
        raise ConfigError(
            f"packed rows (seq_idx) need a block-diagonal mask, which attn_implementation={attention!r} "
            "does not take; load the model with attn_implementation='sdpa'"
        )


def prepare_cache(model: Any, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    """See `families.prepare_generation_cache`."""
    from transformers import DynamicCache

    if model_kwargs.pop("cuda_graphs", False):
        raise ConfigError(
            f"cuda_graphs=True is for Mamba, whose states have a fixed size; {model.config.model_type} is decoded "
            "by transformers: pass cache_implementation='static' to generate instead"
        )
    if generation_config.use_cache is False:
        return
    if model_kwargs.get("past_key_values") is None:
        model_kwargs["past_key_values"] = DynamicCache(config=model.config)
    else:
        model_kwargs["past_key_values"]._is_user_defined = True


FAMILY = LanguageFamily(
    build=build,
    load=load,
    run=run,
    prepare_cache=prepare_cache,
    stateful=False,
    needs_mask_after_prompt=True,
)
