"""The shipped mini parts load with plain transformers, fit together, and are the files the manifest names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, SiglipImageProcessor, SiglipVisionModel


@pytest.fixture(scope="module")
def tokenizer(mini: Path):
    return AutoTokenizer.from_pretrained(mini / "tokenizer")


def test_manifest_names_every_file_and_all_fit_in_8_megabytes(mini: Path) -> None:
    manifest = json.loads((mini / "manifest.json").read_text(encoding="utf-8"))
    shipped = {p.relative_to(mini).as_posix() for p in mini.rglob("*") if p.is_file()}
    assert shipped - {"manifest.json", "README.md"} == set(manifest)
    for name, entry in manifest.items():
        data = (mini / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"], name
        assert len(data) == entry["bytes"]
    assert sum(entry["bytes"] for entry in manifest.values()) <= 8_000_000
    assert not [name for name in shipped if name.endswith((".bin", ".pt", ".pth", ".pickle"))]


def test_tokenizer_is_like_gpt_neox(tokenizer) -> None:
    assert tokenizer.bos_token is None
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == tokenizer.unk_token_id == 0
    assert tokenizer.eos_token == "<|endoftext|>"
    assert "<image>" not in tokenizer.get_vocab()
    ids = tokenizer("Where is the 7?").input_ids
    assert 0 not in ids  # nothing is added at the front or the back
    assert tokenizer("").input_ids == []


@pytest.mark.parametrize(
    "text",
    [
        "USER: What digit is it?\nAnswer the question using a single word or phrase. ASSISTANT: 7",
        "Two digits: a red 7 at the top left and an orange 8 at the bottom right.",
        "Überraschung: 漢字, \ttabs\nand   spaces",
    ],
)
def test_tokenizer_round_trips_any_text(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    "word", [" 7", " red", " top", " left", " first", " yes", " four", " digit", " ASSISTANT"]
)
def test_words_of_the_playground_are_single_tokens(tokenizer, word: str) -> None:
    assert len(tokenizer(word).input_ids) == 1


def test_encoder_is_a_siglip_of_64_tokens(mini: Path) -> None:
    encoder, report = SiglipVisionModel.from_pretrained(mini / "siglip", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert (encoder.config.image_size, encoder.config.patch_size) == (64, 8)
    images = SiglipImageProcessor.from_pretrained(mini / "siglip")
    pixels = images(np.zeros((96, 96, 3), np.uint8), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 64, 64)
    assert torch.equal(pixels, torch.full_like(pixels, -1.0))
    with torch.no_grad():
        states = encoder(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert states[-2].shape == (1, 64, encoder.config.hidden_size)
    assert torch.isfinite(states[-2]).all()


def test_language_model_loads_without_gaps_and_has_room_for_the_image_token(mini: Path, tokenizer) -> None:
    from vlmamba.models.language import MambaLM

    model = MambaLM.from_pretrained(mini / "mamba").eval()
    assert model.config.vocab_size % 8 == 0
    assert model.config.vocab_size > len(tokenizer)
    own = AutoTokenizer.from_pretrained(mini / "mamba")
    assert own.get_vocab() == tokenizer.get_vocab()
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head.data_ptr() == embeddings.data_ptr()


def answer(model, tokenizer, prompt: str) -> str:
    ids = torch.tensor([tokenizer(prompt).input_ids])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_language_model_knows_the_language_and_nothing_of_any_image(mini: Path, tokenizer) -> None:
    from vlmamba.models.language import MambaLM

    model = MambaLM.from_pretrained(mini / "mamba").eval()
    places = {"top left", "top right", "bottom left", "bottom right"}
    assert answer(model, tokenizer, "USER: Where is the 7? ASSISTANT:") in places
    assert answer(model, tokenizer, "USER: How many digits are there? ASSISTANT:") in {
        "one",
        "two",
        "three",
        "four",
    }
    assert answer(model, tokenizer, "USER: What colour is the 3? ASSISTANT:").isalpha()


def test_building_code_never_touches_heldout_digits(scenes, mini: Path, mini_encoder) -> None:
    """The encoder's stream draws training samples only, and refuses anything else."""
    tokenizer = AutoTokenizer.from_pretrained(mini / "tokenizer")
    recipe = mini_encoder.EncoderTraining(steps=1, batch_size=8)
    stream = mini_encoder.SceneStream(tokenizer, recipe)
    batch = stream.batch(0)
    assert batch["pixels"].shape == (8, 3, 64, 64)
    again = stream.batch(0)
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    stream.pool = scenes.digit_pools()[1]
    with pytest.raises(AssertionError, match="a held-out digit was drawn"):
        stream.batch(0)
