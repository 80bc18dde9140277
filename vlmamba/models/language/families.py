"""The small interface through which the vision-language model uses any language model.

Shapes: B batch, L length, D model width, V vocabulary.

A family is what language models of one kind can do exactly, and it says no to the rest. It is chosen by the config's
`vlmamba_family` (``package.module:function`` of your own: config -> `LanguageFamily`), else by its `model_type`: the
entry of that name in `FAMILIES`, else "attention" if all of the model's layers are attention, else "recurrent".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlmamba.errors import ConfigError, ShapeError
from vlmamba.registry import Registry

Verdict = bool | str
"""True, or why not and what to do instead, in words for the user."""


class LanguageOutput(NamedTuple):
    """What a language model makes of embedded tokens, below its head.

    Attributes:
        hidden: (B, L, D) after the last norm; `language_logits` makes logits of them.
        cache: What a later call goes on from, or None.
        layers: Hidden states of every layer, if they were asked for.
    """

    hidden: torch.Tensor
    cache: Any = None
    layers: tuple[torch.Tensor, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class LanguageInput:
    """What a language model is run on; see `run_language_model`."""

    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor | None = None
    seq_idx: torch.Tensor | None = None
    cache: Any = None
    use_cache: bool = False
    output_hidden_states: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """B and L."""
        return self.inputs_embeds.shape[0], self.inputs_embeds.shape[1]


@dataclass(frozen=True, kw_only=True)
class LanguageFamily:
    """What a language model of some kind can do, and what it does exactly.

    Attributes:
        build: Config -> model with random weights.
        load: Directory or hub id, dtype, and further keyword arguments of `from_pretrained` -> model.
        run: Model, `LanguageInput` -> `LanguageOutput`.
        logits: Model, hidden states (..., D) -> logits (..., V), through all that the family does behind its last
            norm (soft caps, scalings).
        prepare_cache: Puts an empty cache into the keyword arguments of `generate`; see
            `prepare_generation_cache`.
        stateful: Whether the cache is a state that cannot be cropped.
        needs_mask_after_prompt: Whether decoding steps need the mask of the earlier columns.
        serves: Whether it can be used at all.
        packs: Whether samples packed into one row (`seq_idx`) are exactly those samples alone.
        pads: Whether padded rows, on either side, are exactly the rows alone.
        continues: Whether several tokens at once may go onto the cache of a batch, with padding anywhere, and whether
            padding may stand between the tokens of a row at all.
    """

    build: Callable[[Any], Any]
    load: Callable[..., Any]
    run: Callable[[Any, LanguageInput], LanguageOutput]
    logits: Callable[[Any, torch.Tensor], torch.Tensor]
    prepare_cache: Callable[[Any, Any, dict[str, Any]], None]
    stateful: bool
    needs_mask_after_prompt: bool
    serves: Verdict = True
    packs: Verdict = True
    pads: Verdict = True
    continues: Verdict = True


OWN_FAMILY = "vlmamba_family"
"""Field of a language model's config that names a family of the user's own."""

FAMILIES: Registry[Callable[[Any], LanguageFamily]] = Registry("language model family", LanguageFamily)
FAMILIES.add("mamba", "vlmamba.models.language.mamba:family")
FAMILIES.add("attention", "vlmamba.models.language.attention:family")
FAMILIES.add("recurrent", "vlmamba.models.language.recurrent:family")


def language_family(config: Any) -> LanguageFamily:
    """The family of a transformers config: its own, else the entry of its `model_type` or of its kind of layers."""
    from vlmamba.models.language.attention import keeps_states

    own = getattr(config, OWN_FAMILY, None)
    if own is not None:
        return FAMILIES.get(own)(config)
    if config.model_type in FAMILIES.names():
        return FAMILIES.get(config.model_type)(config)
    return FAMILIES.get("recurrent" if keeps_states(config) else "attention")(config)


def family_of(model: Any) -> LanguageFamily:
    """The family of a language model, looked up once for each implementation of attention that it is given."""
    key = getattr(model.config, "_attn_implementation", None)
    known: dict[Any, LanguageFamily] = model.__dict__.setdefault("_language_families", {})
    if key not in known:
        known[key] = language_family(model.config)
    return known[key]


def build_language_model(config: Any) -> Any:
    """A language model with random weights.

    Args:
        config: A transformers config; its `model_type` decides.

    Raises:
        ConfigError: No family can serve it exactly.
    """
    return _serving(config).build(config)


def load_language_model(
    path: str | Path, dtype: torch.dtype | str | None = None, *, family: str | None = None, **options: Any
) -> Any:
    """A language model with its weights.

    Args:
        path: Local directory or hub id, in transformers' layout or the original state-spaces/mamba one; told
            apart by the content of config.json.
        dtype: Dtype of the weights; that of the checkpoint when not given.
        family: ``package.module:function`` of a family of the user's own.
        **options: Further keyword arguments of `from_pretrained` (revision, local_files_only, ...).

    Raises:
        MissingFileError: No such directory, or files are missing in it.
        CheckpointError: The weights do not fit the config.
        ConfigError: No family can serve it exactly.
    """
    from vlmamba.models.language.loading import model_options, read_config, resolve_directory

    directory = resolve_directory(path, **options)
    model = _serving(read_config(directory, family)).load(directory, dtype, **model_options(options))
    if family is not None:
        setattr(model.config, OWN_FAMILY, family)
    return model


def run_language_model(
    model: Any,
    *,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    cache: Any = None,
    use_cache: bool | None = None,
    output_hidden_states: bool = False,
) -> LanguageOutput:
    """Hidden states of embedded tokens, whatever the language model is.

    Args:
        model: A model of `build_language_model` or `load_language_model`.
        inputs_embeds: (B, L, D).
        attention_mask: (B, >= L), 0 at padding on either side; with a cache it may cover the earlier columns
            too, and for a transformer it must.
        seq_idx: (B, L) sample index within packed rows; samples do not see each other.
        cache: Of an earlier call, continued and updated in place.
        use_cache: Whether to return a cache; by default only when one is given.
        output_hidden_states: Also return the hidden states of every layer.

    Raises:
        ShapeError: Inputs that do not fit together.
        ConfigError: The family cannot do this exactly.
    """
    family = family_of(model)
    if seq_idx is not None:
        require(family.packs, model.config, "packed rows (seq_idx)")
        if use_cache and cache is None:
            raise ShapeError(
                "seq_idx was given with use_cache=True, but a packed row cannot be continued: which of its samples "
                "would be meant? Leave use_cache off, or pass the samples as padded rows"
            )
    if family.pads is not True and attention_mask is not None and bool((attention_mask == 0).any()):
        require(family.pads, model.config, "padded rows")
    given = LanguageInput(
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        seq_idx=seq_idx,
        cache=cache,
        use_cache=cache is not None if use_cache is None else use_cache,
        output_hidden_states=output_hidden_states,
    )
    return family.run(model, given)


def language_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (..., V) in fp32 of hidden states (..., D), as the language model's own forward pass makes them."""
    return family_of(model).logits(model, hidden).float()


def prepare_generation_cache(model: Any, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    """What a model that contains `model` does in `_prepare_cache_for_generation`.

    Puts an empty cache of the right kind under transformers' own name for it (`versions.CACHE`), unless there is one
    or `use_cache` is False.

    Args:
        model: The language model.
        generation_config: The generation config `generate` hands over.
        model_kwargs: The keyword arguments `generate` collects; changed in place.
    """
    family_of(model).prepare_cache(model, generation_config, model_kwargs)


def require(verdict: Verdict, config: Any, wish: str) -> None:
    """Raise unless a family can do something exactly.

    Raises:
        ConfigError: With the family's reason.
    """
    if verdict is not True:
        raise ConfigError(f"language model {config.model_type!r}: {wish} would not be exact: {verdict}")


def _serving(config: Any) -> LanguageFamily:
    family = language_family(config)
    if family.serves is not True:
        raise ConfigError(f"language model {config.model_type!r} is refused: {family.serves}")
    return family
