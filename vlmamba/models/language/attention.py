"""Causal language models of transformers whose layers are attention: the baseline for Mamba.

Packed rows get a block-diagonal mask. Where all layers see everything before them it is made here; where some see a
window, transformers' own masks are asked for, which keep the windows: it takes positions that start anew for samples
of their own.

Shapes: B batch, L length, T columns in the cache and the input together, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmamba.errors import ConfigError, ShapeError
from vlmamba.models.language.families import LanguageFamily, LanguageOutput, Verdict
from vlmamba.models.language.head import logits
from vlmamba.models.language.versions import CACHE, CACHE_NAMES, arguments_of, cache_of, one_cache


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


def layer_kinds(config: Any) -> frozenset[str]:
    """What the layers keep between steps, by the names of transformers' own classes."""
    from transformers import DynamicCache

    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, KeyError, TypeError, ValueError):  # a config without what that needs
        return frozenset()
    return frozenset(type(layer).__name__ for layer in layers)


def keeps_states(config: Any) -> bool:
    """Whether any layer is recurrent, by what transformers says of the model and of its cache."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        return False  # no causal language model of transformers; building says so
    return bool(getattr(model, "_is_stateful", False)) or any(
        "Linear" in kind for kind in layer_kinds(config)
    )


def packs(config: Any) -> Verdict:
    """Whether packed rows are exact."""
    implementation = getattr(config, "_attn_implementation", None) or ""
    if "flash" in implementation:
        return (
            f"attn_implementation={implementation!r} takes no block-diagonal mask; set model.language.attention sdpa "
            "(attn_implementation='sdpa'), or data.pack_length none"
        )
    other = layer_kinds(config) - {"DynamicLayer", "DynamicSlidingWindowLayer"}
    if other or "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        kinds = ", ".join(sorted(other)) or "chunks"
        return f"it has layers that choose what they see ({kinds}); set data.pack_length none"
    return True


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
    cache: Any,
    use_cache: bool,
    output_hidden_states: bool,
) -> LanguageOutput:
    """See `families.run_language_model`."""
    from transformers import Cache

    if cache is not None:
        check_cache(model, cache, Cache)
    batch, length = inputs_embeds.shape[:2]
    past = 0 if cache is None else int(cache.get_seq_length())
    position_ids = None
    if seq_idx is not None:
        _check_packed(model, seq_idx, (batch, length), past)
        if "DynamicSlidingWindowLayer" in layer_kinds(model.config):
            if use_cache:
                raise ShapeError("a packed row fills no cache; leave use_cache off")
            position_ids, attention_mask = _with_padding_apart(seq_idx, attention_mask), None
        else:
            position_ids = packed_position_ids(seq_idx)
            attention_mask = packed_attention_mask(seq_idx, inputs_embeds.dtype, attention_mask)
    elif attention_mask is not None:
        if attention_mask.shape != (batch, past + length):
            raise ShapeError(
                f"attention_mask has shape {tuple(attention_mask.shape)} but {model.config.model_type} needs "
                f"{(batch, past + length)}: {past} cached columns and {length} new ones"
            )
        position_ids = padded_position_ids(attention_mask, length)
    elif past:
        position_ids = torch.arange(past, past + length, device=inputs_embeds.device).expand(batch, -1)
    return call_decoder(
        model,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        cache=cache,
        use_cache=use_cache,
        output_hidden_states=output_hidden_states,
    )


def call_decoder(
    model: Any, *, cache: Any, use_cache: bool, position_ids: torch.Tensor | None, **inputs: Any
) -> LanguageOutput:
    """Run what is below the head, with the names that its class has for things."""
    decoder = model.get_decoder()
    known = arguments_of(type(decoder).forward)
    if "position_ids" in known:
        inputs["position_ids"] = position_ids
    inputs[next((name for name in CACHE_NAMES if name in known), CACHE)] = cache
    output = decoder(**inputs, use_cache=use_cache, return_dict=True)
    filled = cache_of(output) if use_cache else None
    return LanguageOutput(output.last_hidden_state, filled, output.get("hidden_states"))


def _with_padding_apart(seq_idx: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Positions (B, L) that restart where the sample changes, padding being a sample of its own.

    Raises:
        ShapeError: There is padding within a sample.
    """
    if attention_mask is None:
        return packed_position_ids(seq_idx)
    real = attention_mask != 0
    apart = torch.where(real, seq_idx, seq_idx.min() - 1)
    positions, in_sample = packed_position_ids(apart), packed_position_ids(seq_idx)
    if bool((real & (positions != in_sample)).any()):
        raise ShapeError(
            "a packed row has padding inside a sample; with attention windows, padding must stand between samples "
            "(give it a seq_idx of its own)"
        )
    return positions


def _check_packed(model: Any, seq_idx: torch.Tensor, shape: tuple[int, int], past: int) -> None:
    if seq_idx.shape != shape:
        raise ShapeError(f"seq_idx has shape {tuple(seq_idx.shape)} but the input is {shape}")
    if past:
        raise ShapeError(
            f"seq_idx was given with a cache of {past} tokens; a packed row starts without a cache, "
            "so pass seq_idx or a cache, not both"
        )


def prepare_cache(model: Any, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    """See `families.prepare_generation_cache`."""
    from transformers import Cache, DynamicCache

    put_cache(model, generation_config, model_kwargs, Cache, lambda: DynamicCache(config=model.config))


def put_cache(
    model: Any, generation_config: Any, model_kwargs: dict[str, Any], kind: type, make: Callable[[], Any]
) -> None:
    """Give `generate` the cache that it was called with, or one of this kind unless it wants none.

    Raises:
        ConfigError: `cuda_graphs`, which is an argument of `generate` for our own Mamba.
        ShapeError: The given cache is of another kind.
    """
    if model_kwargs.pop("cuda_graphs", False):
        raise ConfigError(
            f"cuda_graphs=True is for Mamba, whose states have a fixed size; {model.config.model_type} is decoded "
            "by transformers; leave it off"
        )
    given = one_cache(model_kwargs)
    if given is not None:
        check_cache(model, given, kind)
        given._is_user_defined = True
    if given is not None or generation_config.use_cache is not False:
        model_kwargs[CACHE] = make() if given is None else given


def check_cache(model: Any, cache: Any, kind: type) -> None:
    """Raise on another kind of cache.

    Raises:
        ShapeError: It is one.
    """
    if not isinstance(cache, kind):
        raise ShapeError(
            f"the cache is a {type(cache).__name__}, but {model.config.model_type} continues a {kind.__name__}; pass "
            "the cache that an earlier call returned, or none"
        )


def family(config: Any) -> LanguageFamily:
    """What attention can do: everything, with masks."""
    return LanguageFamily(
        build=build,
        load=load,
        run=run,
        logits=logits,
        prepare_cache=prepare_cache,
        stateful=False,
        needs_mask_after_prompt=True,
        packs=packs(config),
    )
