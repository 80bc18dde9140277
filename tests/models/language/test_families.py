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
    language_logits,
    load_language_model,
    prepare_generation_cache,
    run_language_model,
)
from vlmamba.models.language.versions import CACHE

LENGTHS = (4, 11, 7)


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


@pytest.fixture(params=["mamba", "llama", "llama eager"])
def model(request, config):
    torch.manual_seed(0)
    if request.param == "mamba":
        return build_language_model(config()).eval()
    attention = "eager" if "eager" in request.param else "sdpa"
    return build_language_model(llama_config(attn_implementation=attention)).eval()


def embed(model, ids):
    return model.get_input_embeddings()(ids)


def test_the_config_decides(config):
    assert type(build_language_model(config())) is MambaLM
    assert type(build_language_model(llama_config())) is LlamaForCausalLM
    assert language_family(config()).stateful
    assert not language_family(llama_config()).stateful


def test_head_of_hidden_states_is_the_models_logits(model, ids):
    output = run_language_model(model, inputs_embeds=embed(model, ids))
    assert output.cache is None
    torch.testing.assert_close(language_logits(model, output.hidden), model(ids).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_singles_and_decodes_on(model, ids, side):
    rows = torch.full_like(ids, 9)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(LENGTHS):
        where = slice(0, n) if side == "right" else slice(11 - n, None)
        rows[row, where], mask[row, where] = ids[row, :n], 1
    hidden, cache, _ = run_language_model(
        model, inputs_embeds=embed(model, rows), attention_mask=mask, use_cache=True
    )
    step = torch.tensor([[5], [6], [7]])
    longer = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
    after, again, _ = run_language_model(
        model, inputs_embeds=embed(model, step), attention_mask=longer, cache=cache
    )
    assert again is cache
    assert cache.get_seq_length() == 12
    for row, n in enumerate(LENGTHS):
        text = torch.cat([ids[row : row + 1, :n], step[row : row + 1]], dim=1)
        alone = run_language_model(model, inputs_embeds=embed(model, text)).hidden
        torch.testing.assert_close(hidden[row][mask[row] == 1], alone[0, :n], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(after[row, 0], alone[0, n], atol=1e-5, rtol=1e-5)


def test_packed_equals_separate(model, ids):
    row = torch.cat([ids[i, :n] for i, n in enumerate(LENGTHS)] + [torch.tensor([9, 9])])[None]
    seq_idx = torch.repeat_interleave(torch.tensor([0, 1, 2, -1]), torch.tensor([*LENGTHS, 2]))[None].int()
    embeds = embed(model, row).detach().requires_grad_()
    packed = run_language_model(
        model, inputs_embeds=embeds, seq_idx=seq_idx, attention_mask=(seq_idx >= 0).long()
    ).hidden
    singles = [
        run_language_model(model, inputs_embeds=embed(model, ids[i : i + 1, :n])).hidden
        for i, n in enumerate(LENGTHS)
    ]
    torch.testing.assert_close(packed[0, :22], torch.cat(singles, dim=1)[0], atol=1e-5, rtol=1e-5)
    packed[0, 4:15].sum().backward()  # the second sample
    assert (embeds.grad[0, :4] == 0).all()
    assert (embeds.grad[0, 15:] == 0).all()
    assert embeds.grad[0, 4:15].abs().sum() > 0


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
        ConfigError, match="flash_attention_2' takes no block-diagonal mask; set model.language"
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
