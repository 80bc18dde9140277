"""The small interface through which the vision-language model uses any language model.

Shapes: B batch, L length, D model width.

A family is chosen by the config's `model_type` alone: "mamba" is our `MambaLM`, everything else any causal
language model of transformers. A new family is one file with a `FAMILY` object and one line in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmamba.registry import Registry


@dataclass(frozen=True, kw_only=True)
class LanguageFamily:
    """What a kind of language model must be able to do.

    Attributes:
        build: Config -> model with random weights.
        load: Directory or hub id, dtype, and further keyword arguments of `from_pretrained` -> model.
        run: Embedded tokens -> hidden states and cache; see `run_language_model`.
        prepare_cache: Puts an empty cache into the keyword arguments of `generate`; see
            `prepare_generation_cache`.
        stateful: Whether the cache is a state that cannot be cropped.
        needs_mask_after_prompt: Whether decoding steps need the mask of the earlier columns.
    """

    build: Callable[[Any], Any]
    load: Callable[..., Any]
    run: Callable[..., tuple[torch.Tensor, Any]]
    prepare_cache: Callable[[Any, Any, dict[str, Any]], None]
    stateful: bool
    needs_mask_after_prompt: bool


FAMILIES: Registry[LanguageFamily] = Registry("language model family")
FAMILIES.add("mamba", "vlmamba.models.language.mamba:FAMILY")
FAMILIES.add("causal_lm", "vlmamba.models.language.causal_lm:FAMILY")


def language_family(config: Any) -> LanguageFamily:
    """The family of a transformers config."""
    return FAMILIES.get("mamba" if config.model_type == "mamba" else "causal_lm")


def build_language_model(config: Any) -> Any:
    """A language model with random weights.

    Args:
        config: A transformers config; its `model_type` decides.
    """
    return language_family(config).build(config)


def load_language_model(path: str | Path, dtype: torch.dtype | str | None = None, **options: Any) -> Any:
    """A language model with its weights.

    Args:
        path: Local directory or hub id, in transformers' layout or the original state-spaces/mamba one; told
            apart by the content of config.json.
        dtype: Dtype of the weights; that of the checkpoint when not given.
        **options: Further keyword arguments of `from_pretrained` (revision, local_files_only, ...).

    Raises:
        MissingFileError: No such directory, or files are missing in it.
        CheckpointError: The weights do not fit the config.
    """
    from vlmamba.models.language.loading import model_options, read_config, resolve_directory

    directory = resolve_directory(path, **options)
    return language_family(read_config(directory)).load(directory, dtype, **model_options(options))


def run_language_model(
    model: Any,
    *,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = None,
) -> tuple[torch.Tensor, Any]:
    """Hidden states of embedded tokens, whatever the language model is.

    The logits are ``model.get_output_embeddings()`` of them.

    Args:
        model: A model of `build_language_model` or `load_language_model`.
        inputs_embeds: (B, L, D).
        attention_mask: (B, >= L), 0 at padding on either side; with a cache it may cover the earlier columns
            too, and for a transformer it must.
        seq_idx: (B, L) sample index within packed rows; samples do not see each other.
        past_key_values: Cache of an earlier call, continued and updated in place.
        use_cache: Whether to return a cache; by default only when one is given.

    Returns:
        Hidden states after the final norm (B, L, D), and the cache or None.

    Raises:
        ShapeError: Inputs that do not fit together.
    """
    return language_family(model.config).run(
        model,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        seq_idx=seq_idx,
        past_key_values=past_key_values,
        use_cache=past_key_values is not None if use_cache is None else use_cache,
    )


def prepare_generation_cache(model: Any, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    """What a model that contains `model` does in `_prepare_cache_for_generation`.

    Puts an empty cache of the right kind under "past_key_values" unless there is one or `use_cache` is False.

    Args:
        model: The language model.
        generation_config: The generation config `generate` hands over.
        model_kwargs: The keyword arguments `generate` collects; changed in place.
    """
    language_family(model.config).prepare_cache(model, generation_config, model_kwargs)
