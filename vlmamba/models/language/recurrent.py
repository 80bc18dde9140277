"""Recurrent and hybrid causal language models of transformers: exact where transformers is, and refused elsewhere.

Their recurrent layers know nothing of the samples of a packed row, so packing is refused for all of them. What else
they can do was measured (`vlmamba check language`; the table is docs/backbones.md).

Shapes: B batch, L length, T columns in the cache and the input together, D model width.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from vlmamba.errors import ConfigError, ShapeError
from vlmamba.models.language.attention import (
    build,
    call_decoder,
    check_cache,
    check_mask,
    check_padding,
    check_rows,
    layer_kinds,
    load,
    padded_position_ids,
    put_cache,
)
from vlmamba.models.language.families import (
    LanguageFamily,
    LanguageInput,
    LanguageOutput,
    Verdict,
    family_of,
    require,
)
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

WITHOUT_PADDING = (
    "with padding between the parts, states in transformers' cache decay over it; run the prompt in one part, padded "
    "on the left"
)

_ANEW = "transformers starts some of its recurrent layers anew when several tokens follow a cache; run it in one part"
NEVER = {"jamba": _ANEW, "falcon_mamba": _ANEW}
"""Model types that do not continue a cache with several tokens at all, and why."""


class StateCache(DynamicCache):
    """transformers' cache, which also counts its columns: layers without keys and values cannot tell."""

    is_compileable = False  # `generate` would prepare masks for a compiled pass, in another form

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.model_type = config.model_type
        self.columns = self.rows = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns seen, the same for all layers."""
        return self.columns

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let row i continue from what was row ``beam_idx[i]``; there may be more or fewer of them."""
        super().reorder_cache(beam_idx)
        self.rows = len(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows only; layers of states know beams alone, which are chosen in the same way."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, in place."""
        if self.rows:
            self.reorder_cache(torch.arange(self.rows).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.columns = 0


def run(model: Any, given: LanguageInput) -> LanguageOutput:
    """See `families.run_language_model`."""
    batch, length = given.shape
    cache, attention_mask = given.cache, given.attention_mask
    if cache is None and given.use_cache:
        cache = StateCache(model.config)
    if cache is not None:
        check_cache(model, cache, StateCache)
        if cache.model_type != model.config.model_type:
            raise ShapeError(
                f"the cache is one of {cache.model_type} but the model is {model.config.model_type}; pass the cache "
                "that an earlier call returned, or none"
            )
        if cache.rows:
            check_rows(cache.rows, batch)
    past = 0 if cache is None else cache.columns
    if past and length > 1 and model.config.model_type in NEVER:
        require(family_of(model).continues, model.config, "several tokens onto a cache")
    if attention_mask is None:
        position_ids = torch.arange(past, past + length, device=given.inputs_embeds.device).expand(batch, -1)
    else:
        check_mask(model, attention_mask, (batch, length), past)
        check_padding(model, attention_mask, cached=cache is not None)
        if cache is not None and length == 1 and not bool(attention_mask[:, -1].all()):
            require(family_of(model).continues, model.config, "padding in a step of one token")
        position_ids = padded_position_ids(attention_mask, length)
        if layer_kinds(model.config) == {"LinearAttentionLayer"}:  # no layer looks at earlier columns
            attention_mask = attention_mask[:, past:]
    with _clamped_steps(model) if past and length == 1 else nullcontext():
        found = call_decoder(model, replace(given, cache=cache, attention_mask=attention_mask), position_ids)
    if cache is not None:
        cache.columns, cache.rows = past + length, batch
    return found


# --- a fault of transformers, mended --------------------------------------------------------------------------

_STEP = "mamba2_selective_state_update"
_LIMITS: ContextVar[tuple[float, float] | None] = ContextVar("time step limits", default=None)


@contextmanager
def _clamped_steps(model: Any) -> Iterator[None]:
    """Clamp time steps in decoding, too: transformers' Mamba-2 scan clamps them to its limits, its step does not.

    Raises:
        ConfigError: The step is no longer where it was.
    """
    limits: tuple[float, float] | None = None
    for mixer in model.modules():
        found = getattr(mixer, "time_step_limit", None)
        if found is not None and tuple(found) != (0.0, math.inf):
            limits = (float(found[0]), float(found[1]))
            _mend_step(sys.modules[type(mixer).__module__])
    token = _LIMITS.set(limits)
    try:
        yield
    finally:
        _LIMITS.reset(token)


def _mend_step(module: Any) -> None:
    """Put a step that knows of limits in the place of a transformers module's own, once."""
    step = getattr(module, _STEP, None)
    if step is None:
        raise ConfigError(
            f"{module.__name__} has no {_STEP}: its decoding does not clamp time steps as its scan does, and cannot be "
            "mended in this release of transformers; use_cache=False is exact"
        )
    if not hasattr(step, "clamps"):
        module.__dict__[_STEP] = _clamping(step)


def _clamping(step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(step)
    def clamped(
        state: Any, x: Any, dt: Any, *args: Any, dt_bias: Any = None, dt_softplus: bool = False, **kw: Any
    ) -> Any:
        limits = _LIMITS.get()
        if limits is not None:
            dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
            dt = (F.softplus(dt) if dt_softplus else dt).clamp(*limits)
            dt_bias, dt_softplus = None, False
        return step(state, x, dt, *args, dt_bias=dt_bias, dt_softplus=dt_softplus, **kw)

    clamped.clamps = True  # type: ignore[attr-defined]
    return clamped


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
        continues=NEVER.get(config.model_type, WITHOUT_PADDING),
    )
