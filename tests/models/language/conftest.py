from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from vlmamba.models.language.mamba import MambaLM


def _config(**changes: object) -> MambaConfig:
    fields: dict = {
        "vocab_size": 48,
        "hidden_size": 16,
        "state_size": 4,
        "num_hidden_layers": 2,
        "initializer_range": 0.3,
        "eos_token_id": 47,
        "pad_token_id": 0,
    }
    return MambaConfig(**(fields | changes))


@pytest.fixture
def config() -> Callable[..., MambaConfig]:
    return _config


@pytest.fixture
def lm() -> MambaLM:
    """A random model whose greedy text is not constant (untied head)."""
    torch.manual_seed(0)
    return MambaLM(_config(tie_word_embeddings=False)).eval()


@pytest.fixture
def pair(lm: MambaLM) -> tuple[MambaLM, MambaForCausalLM]:
    """Ours and transformers' with the same weights."""
    theirs = MambaForCausalLM(_config(tie_word_embeddings=False)).eval()
    theirs.load_state_dict(lm.state_dict())
    return lm, theirs


@pytest.fixture
def ids() -> torch.Tensor:
    """(3, 11) token ids without special tokens."""
    return torch.randint(1, 47, (3, 11), generator=torch.Generator().manual_seed(1))
