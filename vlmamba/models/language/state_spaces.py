"""The original layout of state-spaces/mamba checkpoints, told by the content of config.json.

The fields are those of `mamba_ssm/models/config_mamba.py` and, inside `ssm_cfg`, the arguments of
`mamba_ssm/modules/mamba_simple.py`. Weight names differ from transformers' in one place only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlmamba.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import MambaConfig

ORIGINAL_EMBEDDING = "backbone.embedding."
TRANSFORMERS_EMBEDDING = "backbone.embeddings."

_SSM_FIELDS = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "dt_rank": "time_step_rank",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init": "time_step_init_scheme",
    "dt_scale": "time_step_scale",
    "dt_init_floor": "time_step_floor",
    "conv_bias": "use_conv_bias",
    "bias": "use_bias",
}
_SSM_IGNORED = {"use_fast_path", "layer", "layer_idx"}
_KEPT_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")


def is_original_config(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is of the original layout.

    transformers' conversions keep the original fields beside their own, so the own ones must be absent.
    """
    return "d_model" in raw and "n_layer" in raw and "num_hidden_layers" not in raw


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """`vocab_size` rounded up to a multiple."""
    return -(-vocab_size // max(multiple, 1)) * max(multiple, 1)


def config_from_original(raw: Mapping[str, Any], where: str = "config.json") -> MambaConfig:
    """The transformers config of an original one; the vocabulary is padded as the weights are.

    Args:
        raw: Content of config.json.
        where: Its place, for messages.

    Raises:
        CheckpointError: It describes something else than a pure Mamba-1 model.
    """
    from transformers import MambaConfig

    ssm = dict(raw.get("ssm_cfg") or {})
    _check_supported(raw, ssm, where)
    fields: dict[str, Any] = {ours: ssm[theirs] for theirs, ours in _SSM_FIELDS.items() if theirs in ssm}
    fields.update({name: raw[name] for name in _KEPT_FIELDS if name in raw})
    initializer = dict(raw.get("initializer_cfg") or {})
    return MambaConfig(
        vocab_size=padded_vocab_size(raw["vocab_size"], raw.get("pad_vocab_size_multiple", 8)),
        hidden_size=raw["d_model"],
        num_hidden_layers=raw["n_layer"],
        residual_in_fp32=raw.get("residual_in_fp32", True),
        layer_norm_epsilon=raw.get("norm_epsilon", 1e-5),
        tie_word_embeddings=raw.get("tie_embeddings", True),
        initializer_range=initializer.get("initializer_range", 0.02),
        rescale_prenorm_residual=initializer.get("rescale_prenorm_residual", True),
        **fields,
    )


def config_to_original(config: MambaConfig) -> dict[str, Any]:
    """The original config.json of a transformers config; `ssm_cfg` holds what differs from the defaults."""
    from transformers import MambaConfig

    default = MambaConfig(hidden_size=config.hidden_size)
    ssm = {
        theirs: getattr(config, ours)
        for theirs, ours in _SSM_FIELDS.items()
        if getattr(config, ours) != getattr(default, ours)
    }
    return {
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": ssm,
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "norm_epsilon": config.layer_norm_epsilon,
        "pad_vocab_size_multiple": 8 if config.vocab_size % 8 == 0 else 1,
        "tie_embeddings": config.tie_word_embeddings,
        "initializer_cfg": {
            "initializer_range": config.initializer_range,
            "rescale_prenorm_residual": config.rescale_prenorm_residual,
        },
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }


def transformers_name(name: str) -> str:
    """The name of an original weight in transformers; other names stay."""
    if name.startswith(ORIGINAL_EMBEDDING):
        return TRANSFORMERS_EMBEDDING + name.removeprefix(ORIGINAL_EMBEDDING)
    return name


def _check_supported(raw: Mapping[str, Any], ssm: Mapping[str, Any], where: str) -> None:
    problems = []
    if ssm.get("layer", "Mamba1") != "Mamba1":
        problems.append(f"ssm_cfg.layer is {ssm['layer']!r}, not 'Mamba1'")
    if raw.get("attn_layer_idx"):
        problems.append(f"attn_layer_idx is {raw['attn_layer_idx']}: it has attention layers")
    if raw.get("d_intermediate"):
        problems.append(f"d_intermediate is {raw['d_intermediate']}: its blocks have MLPs")
    if not raw.get("rms_norm", True):
        problems.append("rms_norm is false: it uses LayerNorm")
    unknown = sorted(ssm.keys() - _SSM_FIELDS.keys() - _SSM_IGNORED)
    if unknown:
        problems.append(f"ssm_cfg has unknown fields {', '.join(unknown)}")
    if not isinstance(raw.get("vocab_size"), int):
        problems.append(f"vocab_size is {raw.get('vocab_size')!r}")
    if problems:
        raise CheckpointError(
            f"{where}: not a Mamba-1 language model that MambaLM can be: {'; '.join(problems)}. "
            "Supported are pure Mamba-1 checkpoints: state-spaces/mamba-130m to -2.8b and their fine-tunes."
        )
