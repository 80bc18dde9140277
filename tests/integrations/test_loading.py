"""Exports loaded in other ways: quantised by bitsandbytes, with parts on disk."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from packaging.version import Version
from PIL import Image
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

import vlmamba.models  # noqa: F401  (registers vlmamba with the Auto classes)
from vlmamba.errors import ConfigError
from vlmamba.ssm.mixer import keeps_fp32
from vlmamba.testing import tiny_model

accelerate = pytest.importorskip("accelerate")
OLD = Version(accelerate.__version__) < Version("1.15")
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
CHAT = [
    {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "\nWhat?"}]}
]
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
CONNECTORS = ["mlp", "vss-mlp", "vss-l2", "qmamba"]


def saved(folder, connector, language):
    model, processor = tiny_model(connector, language=language)
    model.save_pretrained(folder)
    batch = processor.apply_chat_template(
        CHAT, tokenize=True, add_generation_prompt=True, return_tensors="pt"
    )
    return model, batch


def load(folder, **options):
    return AutoModelForImageTextToText.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("language", ["mamba", "llama"])
@torch.no_grad()
def test_parts_on_disk_change_nothing(tmp_path, connector, language):
    model, batch = saved(tmp_path / "export", connector, language)
    most = {"vision_tower": "cpu", "multi_modal_projector": "disk", "language_model": "disk"}
    half = {"vision_tower": "disk", "multi_modal_projector": "disk", "language_model": "cpu"}
    for number, places in enumerate((most, half)):
        if OLD and language == "mamba":
            with pytest.raises(ConfigError, match=r"need accelerate 1.15 or newer"):
                load(tmp_path / "export", device_map=places, offload_folder=tmp_path / str(number))
            continue
        away = load(tmp_path / "export", device_map=places, offload_folder=tmp_path / str(number))
        assert any(parameter.is_meta for parameter in away.parameters())
        assert torch.equal(away(**batch).logits, model(**batch).logits)
        assert torch.equal(away.generate(**batch, **GREEDY), model.generate(**batch, **GREEDY))


@pytest.mark.parametrize("connector", CONNECTORS)
@torch.no_grad()
def test_any_split_between_memory_and_disk_changes_nothing(tmp_path, connector):
    model, batch = saved(tmp_path / "export", connector, "llama" if OLD else "mamba")
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    wanted = model(**batch).logits
    for tenths in range(5 if OLD else 1, 10, 2):
        memory = {"cpu": size * tenths // 10}
        options = {"device_map": "auto", "max_memory": memory, "offload_folder": tmp_path / str(tenths)}
        assert torch.equal(load(tmp_path / "export", **options)(**batch).logits, wanted), memory


def dequantised(model, quantised):
    """`model` with the weights that a 4-bit one stands for."""
    from bitsandbytes.functional import dequantize_4bit

    exact = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    count = 0
    for name, module in quantised.named_modules():
        if type(module).__name__ == "Linear4bit":
            exact[name].weight.copy_(dequantize_4bit(module.weight.data, module.weight.quant_state))
            count += 1
    return model, count


@pytest.mark.parametrize("language", ["mamba", "llama"])
@torch.no_grad()
def test_four_bits_are_the_model_of_the_rounded_weights(tmp_path, language):
    pytest.importorskip("bitsandbytes")
    model, batch = saved(tmp_path / "export", "vss-l2", language)
    options = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    small = load(tmp_path / "export", quantization_config=options, device_map="cpu")
    before = model(**batch).logits
    model, count = dequantised(model, small)
    linear = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    kept = [name for name in linear if keeps_fp32(f"{name}.bias") or name.endswith("lm_head")]
    assert count == len(linear) - len(kept) > 0
    wanted = model(**batch).logits
    assert float((before - wanted).norm() / before.norm()) > 0.02, "rounding to four bits must be seen"
    torch.testing.assert_close(small(**batch).logits, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(small.generate(**batch, **GREEDY), model.generate(**batch, **GREEDY))
    small.save_pretrained(tmp_path / "small")
    again = load(tmp_path / "small", device_map="cpu")
    assert torch.equal(again(**batch).logits, small(**batch).logits)


@pytest.mark.parametrize("language", ["mamba", "llama"])
@torch.no_grad()
def test_eight_bits_are_near(tmp_path, language):
    pytest.importorskip("bitsandbytes")
    model, batch = saved(tmp_path / "export", "vss-l2", language)
    small = load(
        tmp_path / "export", quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
    )
    assert {p.dtype for p in small.parameters()} >= {torch.int8, torch.float32}
    found, wanted = small(**batch).logits, model(**batch).logits
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.05
    assert small.generate(**batch, **GREEDY).shape[1] == batch["input_ids"].shape[1] + 5


def test_adapters_train_over_four_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    _, batch = saved(tmp_path / "export", "vss-l2", "mamba")
    small = load(
        tmp_path / "export", quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cpu"
    )
    small = peft.prepare_model_for_kbit_training(small, use_gradient_checkpointing=False)
    small = peft.get_peft_model(
        small, peft.LoraConfig(target_modules=r".*language_model.*\.(in_proj|x_proj)")
    )
    optimizer = torch.optim.SGD([p for p in small.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(3):
        loss = small(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
