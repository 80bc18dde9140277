"""The small interface: MambaLM and transformers' causal language models behind it."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM

from vlmamba.errors import CheckpointError, ConfigError, ShapeError
from vlmamba.models.language import (
    MambaCache,
    MambaLM,
    build_language_model,
    language_family,
    load_language_model,
    prepare_generation_cache,
    run_language_model,
)
from vlmamba.models.language.versions import CACHE


def llama_config(**changes: object) -> LlamaConfig:
    fields: dict = {
        "vocab_size": 48,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.3,
    }
    return LlamaConfig(**(fields | changes))


def embed(model, ids):
    return model.get_input_embeddings()(ids)


def test_the_config_decides(config):
    assert type(build_language_model(config())) is MambaLM
    assert type(build_language_model(llama_config())) is LlamaForCausalLM
    assert language_family(config()).stateful
    assert not language_family(llama_config()).stateful


def test_bad_packing(ids, config):
    llama = build_language_model(llama_config())
    embeds = embed(llama, ids)
    with pytest.raises(ShapeError, match=r"seq_idx has shape \(3, 4\) but the input is \(3, 11\)"):
        run_language_model(llama, inputs_embeds=embeds, seq_idx=torch.zeros(3, 4))
    _, cache, _ = run_language_model(llama, inputs_embeds=embeds, use_cache=True)
    with pytest.raises(ShapeError, match="cache of 11 tokens"):
        run_language_model(llama, inputs_embeds=embeds, seq_idx=torch.zeros(3, 11), cache=cache)
    with pytest.raises(ShapeError, match=r"needs \(3, 22\): 11 cached columns and 11 new ones"):
        run_language_model(llama, inputs_embeds=embeds, attention_mask=torch.ones(3, 11), cache=cache)
    llama.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ConfigError, match=r"flash_attention_2' takes no block-diagonal mask; set model.language"
    ):
        run_language_model(llama, inputs_embeds=embeds, seq_idx=torch.zeros(3, 11))


def test_generation_caches(config):
    for model, kind in (
        (build_language_model(config()), MambaCache),
        (build_language_model(llama_config()), DynamicCache),
    ):
        kwargs: dict = {}
        prepare_generation_cache(model, GenerationConfig(), kwargs)
        assert type(kwargs[CACHE]) is kind
        kept = kwargs[CACHE]
        prepare_generation_cache(model, GenerationConfig(), kwargs)
        assert kwargs[CACHE] is kept
        off: dict = {}
        prepare_generation_cache(model, GenerationConfig(use_cache=False), off)
        assert off == {}


def test_loading_a_llama(tmp_path, ids):
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config()).eval()
    model.save_pretrained(tmp_path)
    again = load_language_model(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert load_language_model(tmp_path, torch.bfloat16).dtype == torch.bfloat16

    state = model.state_dict()
    state["model.layers.0.extra.weight"] = state.pop("model.norm.weight")
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(33, 16)
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError) as caught:
        load_language_model(tmp_path)
    text = str(caught.value)
    assert "1 missing: model.norm.weight" in text
    assert "1 unexpected: model.layers.0.extra.weight" in text
    assert "model.layers.1.mlp.up_proj.weight: (33, 16) in the checkpoint, (32, 16) in the model" in text
