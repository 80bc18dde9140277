"""Other language models through the recipe's entrance: causal, packed where that is exact, the same after export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText

import vlmamba.models  # noqa: F401 - registers the Auto classes
from vlmamba.common.load import load_model
from vlmamba.errors import ConfigError, MissingDependencyError
from vlmamba.models import VLMambaForConditionalGeneration, builder
from vlmamba.models.builder import build_model
from vlmamba.models.language import build_language_model
from vlmamba.testing.families import tiny_config
from vlmamba.training.dry_run import dry_run
from vlmamba.training.export import export_model
from vlmamba.training.run import prepare_model, run


@pytest.fixture
def use_language(weights: Path, tmp_path: Path):
    """Save a tiny model of a type beside the small task's tokenizer, as a user would have downloaded it."""

    def save(model_type: str) -> dict[str, str]:
        target = tmp_path / model_type
        config = tiny_config(model_type, vocab_size=368, eos_token_id=0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            build_language_model(config).save_pretrained(target)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(weights / "language" / name, target / name)
        return {"model.language.path": str(target)}

    return save


def some_input(model, processor):
    messages = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "\nHow many digits are there?"}],
        },
        {"role": "assistant", "content": "Two. Where is the seven? Top left."},
    ]
    ids = torch.tensor([processor.encode_messages(messages).input_ids])
    size = model.vision_tower.image_size
    return ids, torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("attention", ["none", "sdpa", "eager"])
def test_a_llama_built_by_a_recipe_is_causal(make_config, use_language, attention, tmp_path):
    config = make_config({**use_language("llama"), "model.language.attention": attention})
    model, processor = build_model(config.model)
    model.eval()
    wanted = "sdpa" if attention == "none" else attention
    assert model.language_model.config._attn_implementation == wanted
    assert model.config.text_config is model.language_model.config

    ids, pixels = some_input(model, processor)
    with torch.no_grad():
        whole = model(input_ids=ids, pixel_values=pixels).logits
        cut = model(input_ids=ids[:, :-10], pixel_values=pixels).logits
        torch.testing.assert_close(whole[:, :-10], cut, atol=1e-5, rtol=1e-5)
        embeds = model.embed(ids, pixels)
        own = model.language_model(inputs_embeds=embeds).logits
        torch.testing.assert_close(whole, own, atol=1e-5, rtol=1e-5)
        export_model(model, processor, tmp_path / "export")
        again, _ = load_model(tmp_path / "export")
        torch.testing.assert_close(
            again(input_ids=ids, pixel_values=pixels).logits, whole, atol=1e-5, rtol=1e-5
        )


def test_a_model_that_sees_its_answers_is_not_built(make_config, use_language, monkeypatch, tmp_path):
    """What happened once: joining the parts took the language model's mask away."""
    config = make_config(use_language("llama"))
    model, processor = build_model(config.model)
    export_model(model, processor, tmp_path / "export")
    make = builder.VLMambaConfig

    def blind(**parts):
        made = make(**parts)
        made.text_config._attn_implementation = None
        return made

    monkeypatch.setattr(builder, "VLMambaConfig", blind)
    with pytest.raises(ConfigError, match=r"'llama' sees what comes later: .*attn_implementation is None"):
        build_model(config.model)

    load = VLMambaForConditionalGeneration.from_pretrained.__func__

    def load_blind(cls, *args, **kwargs):
        loaded, info = load(cls, *args, **kwargs)
        loaded.language_model.config._attn_implementation = None
        return loaded, info

    monkeypatch.setattr(VLMambaForConditionalGeneration, "from_pretrained", classmethod(load_blind))
    with pytest.raises(ConfigError, match="sees what comes later"):
        load_model(tmp_path / "export")


def test_attention_may_be_changed_later(make_config, use_language):
    model, processor = build_model(make_config(use_language("llama")).model)
    ids, pixels = some_input(model.eval(), processor)
    before = model(input_ids=ids, pixel_values=pixels).logits
    model.set_attn_implementation("eager")
    assert model.language_model.config._attn_implementation == "eager"
    after = model(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_flash_attention_is_kept_or_named(make_config, use_language, monkeypatch):
    """Without the package it says so; with it (its check alone is stood in for), the join of the parts keeps it."""
    config = make_config({**use_language("llama"), "model.language.attention": "flash_attention_2"})
    with pytest.raises((ImportError, ValueError, MissingDependencyError), match=r"(?i)flash"):
        build_model(config.model)

    from transformers import PreTrainedModel

    monkeypatch.setattr(
        PreTrainedModel,
        "_check_and_adjust_attn_implementation",
        lambda self, asked, *args, **kwargs: asked or "sdpa",
    )
    model, _ = build_model(config.model)
    assert model.config._attn_implementation == "flash_attention_2"
    assert model.language_model.config._attn_implementation == "flash_attention_2"
    packed = make_config(
        {**use_language("llama"), "model.language.attention": "flash_attention_2", "data.pack_length": 128}
    )
    with pytest.raises(ConfigError, match=r"takes no block-diagonal mask; set model.language.attention sdpa"):
        prepare_model(packed, torch.device("cpu"))


def test_attention_means_nothing_for_mamba(make_config):
    with pytest.raises(ConfigError, match=r"Mamba has no attention.*leave it out"):
        build_model(make_config({"model.language.attention": "eager"}).model)


@pytest.mark.parametrize("model_type", ["falcon_h1", "gemma2", "mamba2", "qwen3_5_text", "zamba2", "granite"])
def test_an_export_has_every_weight_and_buffer(make_config, use_language, model_type, tmp_path):
    """Buffers that are not saved (Falcon-H1's multipliers, rotary frequencies) are the same after loading, too."""
    model, processor = build_model(make_config(use_language(model_type)).model)
    model.eval()
    export_model(model, processor, tmp_path / "export")
    ids, pixels = some_input(model, processor)
    before = dict([*model.named_parameters(), *model.named_buffers()])
    with torch.no_grad():
        wanted = model(input_ids=ids, pixel_values=pixels, output_hidden_states=True)
        for again in (
            load_model(tmp_path / "export")[0],
            AutoModelForImageTextToText.from_pretrained(tmp_path / "export"),
        ):
            after = dict([*again.named_parameters(), *again.named_buffers()])
            assert before.keys() == after.keys()
            assert [name for name in before if not torch.equal(before[name], after[name])] == []
            torch.testing.assert_close(again.eval()(input_ids=ids, pixel_values=pixels).logits, wanted.logits)
        headless = AutoModel.from_pretrained(tmp_path / "export").eval()
        hidden = headless(input_ids=ids, pixel_values=pixels).last_hidden_state
        torch.testing.assert_close(hidden, wanted.hidden_states[-1])
        torch.testing.assert_close(
            model.base_model(input_ids=ids, pixel_values=pixels).last_hidden_state, hidden
        )


def test_packing_that_would_leak_is_refused_before_anything_is_read(make_config, use_language):
    changes = {"data.pack_length": 128}
    config = make_config({**use_language("bamba"), **changes})
    message = r"'bamba': packed rows \(data.pack_length\) would not be exact: .* set data.pack_length none"
    for entrance in (lambda: dry_run(config), lambda: run(config)):
        with pytest.raises(ConfigError, match=message):
            entrance()


@pytest.mark.parametrize("model_type", ["mistral", "gemma2"])
def test_packed_training_with_attention_windows_is_padded_training(make_config, use_language, model_type):
    language = use_language(model_type)
    common = {**language, "max_steps": 3, "epochs": "none", "optim.lr": 1e-3}
    run(make_config(common, output="padded"))
    run(make_config({**common, "data.pack_length": 192}, output="packed"))
    losses = [
        [
            json.loads(line)["loss"]
            for line in (Path(config.output) / "log.jsonl").read_text().splitlines()
            if "loss" in line
        ]
        for config in (make_config(common, output="padded"), make_config(common, output="packed"))
    ]
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
