"""Causal language models of transformers whose layers are attention: the baseline for Mamba.

Packed rows get block-diagonal masks made here, with the window of the layers that have one: transformers would take
position ids that start anew for samples of their own, but not all of its models look at them.

Shapes: B batch, L length, T columns in the cache and the input together, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Cache

from vlmamba.errors import ConfigError, ShapeError
from vlmamba.models.language.cache import RealFirst
from vlmamba.models.language.families import (
    LanguageFamily,
    LanguageInput,
    LanguageOutput,
    Verdict,
    family_of,
    require,
)
from vlmamba.models.language.head import logits
from vlmamba.models.language.versions import CACHE, CACHE_NAMES, arguments_of, cache_of, one_cache


def build(config: Any) -> nn.Module:
    """A model with random weights from its config."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def load(path: str | Path, dtype: torch.dtype | str | None = None, **options: Any) -> nn.Module:
    """A model with its weights; every key and shape must fit.

    Raises:
        CheckpointError: Missing or unexpected keys, other shapes, or a pickle that holds more than weights.
    """
    from transformers import AutoModelForCausalLM

    from vlmamba.models.language.loading import load_strictly

    return load_strictly(AutoModelForCausalLM, path, dtype=dtype, **options)


def _layers(config: Any) -> list[Any]:
    """What the layers keep between steps: transformers' own description of them."""
    from transformers import DynamicCache

    try:
        return list(DynamicCache(config=config).layers)
    except (AttributeError, KeyError, TypeError, ValueError):  # a config without what that needs
        return []


def layer_kinds(config: Any) -> frozenset[str]:
    """Kinds of layers, by the names of transformers' classes for their caches."""
    return frozenset(type(layer).__name__ for layer in _layers(config))


def window_of(config: Any) -> int | None:
    """Tokens that a layer with an attention window sees, itself included; None without such layers."""
    return max(
        (layer.sliding_window for layer in _layers(config) if hasattr(layer, "sliding_window")), default=None
    )


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
    implementation = getattr(config, "_attn_implementation", None) or "sdpa"
    if implementation not in ("sdpa", "eager"):
        return (
            f"attn_implementation={implementation!r} takes no block-diagonal mask; set model.language.attention sdpa "
            "(attn_implementation='sdpa'), or data.pack_length none"
        )
    layers = _layers(config)
    other = {type(layer).__name__ for layer in layers} - {"DynamicLayer", "DynamicSlidingWindowLayer"}
    windows = {layer.sliding_window for layer in layers if hasattr(layer, "sliding_window")}
    if other or len(windows) > 1 or "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        kinds = ", ".join(sorted(other)) or "chunks, or windows of several widths"
        return f"it has layers that choose what they see ({kinds}); set data.pack_length none"
    return True


def continues(config: Any) -> Verdict:
    """Whether several tokens may follow a cache, padding between."""
    if window_of(config) is None:
        return True
    return (
        "with padding between the parts, attention windows in transformers' cache count it as tokens; run the prompt "
        "in one part, padded on the left"
    )


def packed_attention_mask(
    seq_idx: torch.Tensor,
    dtype: torch.dtype,
    attention_mask: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Additive causal mask in which the samples of a packed row do not see each other.

    Args:
        seq_idx: (B, L) sample index.
        dtype: Dtype of the scores the mask is added to.
        attention_mask: (B, L), 0 at padding, which nobody sees (but itself).
        window: Tokens that are seen, itself included; all when not given.

    Returns:
        (B, 1, L, L), 0 where attended and the dtype's lowest value elsewhere.
    """
    length = seq_idx.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=seq_idx.device).tril()
    seen = (seq_idx[:, :, None] == seq_idx[:, None, :]) & earlier
    real = torch.ones_like(seq_idx) if attention_mask is None else (attention_mask != 0).to(seq_idx.dtype)
    if window is not None:
        number = real.cumsum(dim=1)  # a window is so many tokens, not columns
        seen = seen & (number[:, :, None] - number[:, None, :] < window)
    if attention_mask is not None:
        itself = torch.eye(length, dtype=torch.bool, device=seq_idx.device)
        seen = seen & ((real != 0)[:, None, :] | itself)
    mask = torch.zeros(seen.shape, dtype=dtype, device=seq_idx.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def _packed_masks(
    config: Any, seq_idx: torch.Tensor, dtype: torch.dtype, attention_mask: torch.Tensor | None
) -> Any:
    """The masks of a packed row in the form that the model takes: one, or one for each type of layer."""
    window = window_of(config)
    types = set(getattr(config, "layer_types", None) or ())
    if window is None or len(types) < 2:
        return packed_attention_mask(seq_idx, dtype, attention_mask, window)
    return {
        "full_attention": packed_attention_mask(seq_idx, dtype, attention_mask),
        "sliding_attention": packed_attention_mask(seq_idx, dtype, attention_mask, window),
    }


def _numbered(seq_idx: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Samples numbered anew: one starts wherever neighbouring tokens differ, though its number stood there before.

    As in a scan; padding is no neighbour.
    """
    mask = torch.ones_like(seq_idx) if attention_mask is None else attention_mask
    moved = RealFirst.from_mask(mask, seq_idx.shape[1])
    found = moved.apply(seq_idx)
    changes = torch.zeros_like(found)
    changes[:, 1:] = found[:, 1:] != found[:, :-1]
    return moved.undo(changes.cumsum(dim=1))


def packed_position_ids(seq_idx: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Positions (B, L) that count the real tokens of every sample from 0."""
    real = torch.ones_like(seq_idx) if attention_mask is None else attention_mask
    earlier = (seq_idx[:, :, None] == seq_idx[:, None, :]) & (real != 0)[:, None, :]
    return (earlier.tril().sum(dim=-1) - 1).clamp(min=0)


def padded_position_ids(attention_mask: torch.Tensor, length: int) -> torch.Tensor:
    """Positions (B, L) of the last `length` columns that count real tokens only."""
    return ((attention_mask != 0).long().cumsum(dim=1) - 1).clamp(min=0)[:, -length:]


def run(model: Any, given: LanguageInput) -> LanguageOutput:
    """See `families.run_language_model`."""
    batch, length = given.shape
    cache, seq_idx, attention_mask, past = given.cache, given.seq_idx, given.attention_mask, 0
    if cache is not None:
        check_cache(model, cache, Cache)
        past = int(cache.get_seq_length())
        if past:
            check_rows(cache.layers[0].keys.shape[0], batch)
    position_ids = None
    if seq_idx is not None:
        _check_packed(model, seq_idx, (batch, length), past)
        seq_idx = _numbered(seq_idx, attention_mask)
        position_ids = packed_position_ids(seq_idx, attention_mask)
        attention_mask = _packed_masks(model.config, seq_idx, given.inputs_embeds.dtype, attention_mask)
    elif attention_mask is not None:
        check_mask(model, attention_mask, (batch, length), past)
        position_ids = padded_position_ids(attention_mask, length)
        check_padding(model, attention_mask, cached=given.use_cache or past > 0)
    elif past:
        position_ids = torch.arange(past, past + length, device=given.inputs_embeds.device).expand(batch, -1)
    return call_decoder(model, replace(given, attention_mask=attention_mask), position_ids)


def call_decoder(model: Any, given: LanguageInput, position_ids: torch.Tensor | None) -> LanguageOutput:
    """Run what is below the head, with the names that its class has for things."""
    decoder = model.get_decoder()
    known = arguments_of(type(decoder).forward)
    inputs: dict[str, Any] = {"position_ids": position_ids} if "position_ids" in known else {}
    inputs[next((name for name in CACHE_NAMES if name in known), CACHE)] = given.cache
    output = decoder(
        inputs_embeds=given.inputs_embeds,
        attention_mask=given.attention_mask,
        use_cache=given.use_cache,
        output_hidden_states=given.output_hidden_states,
        return_dict=True,
        **inputs,
    )
    filled = cache_of(output) if given.use_cache else None
    return LanguageOutput(output.last_hidden_state, filled, output.get("hidden_states"))


def check_mask(model: Any, attention_mask: torch.Tensor, shape: tuple[int, int], past: int) -> None:
    """Raise unless a mask covers the cached columns and the new ones.

    Raises:
        ShapeError: It covers others.
    """
    batch, length = shape
    if attention_mask.shape != (batch, past + length):
        raise ShapeError(
            f"attention_mask has shape {tuple(attention_mask.shape)} but {model.config.model_type} needs "
            f"{(batch, past + length)}: {past} cached columns and {length} new ones"
        )


def check_padding(model: Any, attention_mask: torch.Tensor, *, cached: bool) -> None:
    """Raise on padding between the tokens of a row; on a cache, where more may follow, also on padding behind them.

    Raises:
        ConfigError: There is some, and the family cannot have it.
    """
    verdict = family_of(model).continues
    if verdict is True:
        return
    real = (attention_mask != 0).int()
    if cached and bool((real[:, 1:] < real[:, :-1]).any()):
        require(verdict, model.config, "padding behind tokens on a cache")
    if bool(
        (real.diff(dim=1).abs().sum(dim=1) + real[:, 0] + real[:, -1] > 2).any()
    ):  # several runs of tokens
        require(verdict, model.config, "padding between tokens")


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
    from transformers import DynamicCache

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


def check_rows(held: int, batch: int) -> None:
    """Raise on a cache of other rows.

    Raises:
        ShapeError: It is one.
    """
    if held != batch:
        raise ShapeError(
            f"the cache holds {held} rows but the input has {batch}; pass a fresh cache, or repeat or select its rows "
            "first (batch_repeat_interleave, batch_select_indices)"
        )


def check_cache(model: Any, cache: Any, kind: type) -> None:
    """Raise on another kind of cache; one that also holds states is another kind than one of keys alone.

    Raises:
        ShapeError: It is one.
    """
    from vlmamba.models.language.recurrent import StateCache  # which stands on this module

    if not isinstance(cache, kind) or (kind is Cache and isinstance(cache, StateCache)):
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
        continues=continues(config),
    )
