"""Language models: our `MambaLM`, and any causal language model of transformers, behind one small interface.

The parts: `families` (the interface and its registry), `mamba`, `attention` and `recurrent` (one family a file), `head`
(any family's logits), `versions` (names in transformers' releases), `laws` and `causality` (checks), `blocks`,
`cache` and `loss` (what `MambaLM` is made of), `loading`, `weights` and `state_spaces` (from files to
models), `sizes` (the official Mamba sizes), `vocabulary` (room for the image token, tokenizers).
"""

from __future__ import annotations

from vlmamba.models.language.cache import MambaCache
from vlmamba.models.language.families import (
    LanguageOutput,
    build_language_model,
    family_of,
    language_family,
    language_logits,
    load_language_model,
    prepare_generation_cache,
    run_language_model,
)
from vlmamba.models.language.loading import read_config
from vlmamba.models.language.loss import apply_head, next_token_loss, select_rows, supervised_positions
from vlmamba.models.language.mamba import MambaLM
from vlmamba.models.language.sizes import mamba_config, parameter_count
from vlmamba.models.language.vocabulary import ensure_token_fits, load_tokenizer

__all__ = [
    "LanguageOutput",
    "MambaCache",
    "MambaLM",
    "apply_head",
    "build_language_model",
    "ensure_token_fits",
    "family_of",
    "language_family",
    "language_logits",
    "load_language_model",
    "load_tokenizer",
    "mamba_config",
    "next_token_loss",
    "parameter_count",
    "prepare_generation_cache",
    "read_config",
    "run_language_model",
    "select_rows",
    "supervised_positions",
]
