"""The official Mamba sizes (arXiv:2312.00752, table 12, and config.json of each state-spaces/mamba-*)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmamba.registry import Registry

if TYPE_CHECKING:
    from transformers import MambaConfig

VOCAB_SIZE = 50280
"""GPT-NeoX's 50,277 tokens padded to a multiple of 8."""

SIZES: Registry[tuple[int, int]] = Registry("Mamba size")
"""Size name -> (hidden_size, num_hidden_layers)."""
for _name, _shape in {
    "130m": (768, 24),
    "370m": (1024, 48),
    "790m": (1536, 48),
    "1.4b": (2048, 48),
    "2.8b": (2560, 64),
}.items():
    SIZES.add(_name, _shape)


def mamba_config(size: str, **changes: Any) -> MambaConfig:
    """The config of an official size.

    The initialisation is the reference code's: embeddings of std 0.02 and out_proj divided by sqrt(layers)
    (mamba_ssm/models/mixer_seq_simple.py), where a bare `MambaConfig()` has 0.1 and no division.

    Args:
        size: "130m", "370m", "790m", "1.4b" or "2.8b".
        **changes: Fields of `MambaConfig` to set differently.

    Raises:
        ConfigError: Unknown size.
    """
    from transformers import MambaConfig

    hidden_size, layers = SIZES.get(size)
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "initializer_range": 0.02,
        "rescale_prenorm_residual": True,
    }
    return MambaConfig(**(fields | changes))


def parameter_count(config: MambaConfig) -> int:
    """Number of parameters of a `MambaLM` of this config, by arithmetic (tied weights counted once)."""
    width, inner, states = config.hidden_size, config.intermediate_size, config.state_size
    rank, kernel = int(config.time_step_rank), config.conv_kernel
    in_proj = width * 2 * inner + (2 * inner if config.use_bias else 0)
    out_proj = inner * width + (width if config.use_bias else 0)
    conv = inner * kernel + (inner if config.use_conv_bias else 0)
    x_proj = inner * (rank + 2 * states)
    dt_proj = rank * inner + inner
    block = width + in_proj + conv + x_proj + dt_proj + inner * states + inner + out_proj
    embeddings = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    return embeddings + config.num_hidden_layers * block + width
