"""A tiny config of every kind of language model, as transformers describes it: a few thousand parameters each."""

from __future__ import annotations

from typing import Any

COMMON: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 47,
}

_STATES = {"state_size": 8, "conv_kernel": 4, "expand": 2}
_LIMIT = (0.02, 0.2)  # so that clamping time steps matters
_MAMBA2 = {
    **_STATES,
    "time_step_limit": _LIMIT,
    "num_heads": 4,
    "head_dim": 8,
    "n_groups": 1,
    "chunk_size": 4,
}
_HYBRID = {
    "time_step_limit": _LIMIT,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SLIDING = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}

TINY_FAMILIES: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4, "expand": 2, "intermediate_size": None},
    # attention
    "llama": {},
    "qwen3": {},
    "gpt_neox": {"num_key_value_heads": None},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0},
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 64},
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {"logits_scaling": 4.0},
    "cohere2": {
        "sliding_window": 3,
        "logit_scale": 0.25,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"sliding_window": 3},
    "mistral": {"sliding_window": 3},
    "gemma2": {**_SLIDING, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_SLIDING, "query_pre_attn_scalar": 8},
    "gpt_oss": {**_SLIDING, "num_local_experts": 3, "num_experts_per_tok": 2},
    # recurrent and hybrid
    "mamba2": _MAMBA2,
    "falcon_mamba": {"state_size": 4, "expand": 2, "intermediate_size": None, "time_step_rank": 2},
    "falcon_h1": {
        **_HYBRID,
        "mamba_d_ssm": 32,
        "lm_head_multiplier": 0.5,
        "ssm_multipliers": [0.5, 1.5, 2.0, 0.25, 1.25],
    },
    "bamba": {**_HYBRID, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **_HYBRID,
        "logits_scaling": 4.0,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 32,
        "position_embedding_type": "nope",
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe"],
        "num_hidden_layers": 3,
        "ssm_state_size": 8,
        "time_step_min": 0.02,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "chunk_size": 4,
        "expand": 2,
        "n_routed_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "num_hidden_layers": 3,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "chunk_size": 4,
        "num_mem_blocks": 1,
        "time_step_min": 0.02,
        "use_mem_rope": True,
        "attention_head_dim": 16,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 2,
        "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "qwen3_next": {**_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": _DELTA,
    "olmo_hybrid": _DELTA,
    "recurrent_gemma": {
        "attention_window_size": 4,
        "lru_width": 16,
        "block_types": ["recurrent", "attention"],
    },
    "rwkv": {"attention_hidden_size": 16, "context_length": 64},
}
"""Model type to what its config says besides `COMMON`; None leaves a field to the family's default."""


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A transformers config of that type, small enough to run in milliseconds.

    Args:
        model_type: One of `TINY_FAMILIES`.
        **changes: Fields over those.

    Raises:
        KeyError: The type is not among `TINY_FAMILIES`.
    """
    from transformers import AutoConfig

    fields = {**COMMON, **TINY_FAMILIES[model_type], **changes}
    return AutoConfig.for_model(
        model_type, **{name: value for name, value in fields.items() if value is not None}
    )
