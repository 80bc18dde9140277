"""Room for added tokens, and tokenizers (a sentencepiece one among them)."""

from __future__ import annotations

import json

import pytest
import torch

from vlmamba.errors import ConfigError, MissingFileError
from vlmamba.models.language import MambaLM, ensure_token_fits, load_tokenizer


def test_a_padded_row_is_used_when_there_is_one(lm):
    before = lm.backbone.embeddings.weight.clone()
    assert ensure_token_fits(lm, 47) == 48
    assert torch.equal(lm.backbone.embeddings.weight, before)


@pytest.mark.parametrize("tied", [True, False])
def test_otherwise_the_vocabulary_grows(tmp_path, config, ids, tied):
    torch.manual_seed(0)
    model = MambaLM(config(tie_word_embeddings=tied)).eval()
    with torch.no_grad():
        before = model(ids).logits
    assert ensure_token_fits(model, 48) == 56
    assert model.config.vocab_size == 56
    assert model.lm_head.weight.shape == model.backbone.embeddings.weight.shape == (56, 16)
    assert (model.lm_head.weight is model.backbone.embeddings.weight) == tied
    logits = model(ids).logits
    torch.testing.assert_close(logits[..., :48], before)
    torch.testing.assert_close(logits[..., 50], before.mean(-1), atol=1e-5, rtol=1e-5)
    model(torch.tensor([[48, 1]]), labels=torch.tensor([[48, 48]])).loss.backward()
    model.save_pretrained(tmp_path)
    again = MambaLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, logits)
    assert ensure_token_fits(again, 55) == 56


def test_resize_token_embeddings(config, ids):
    model = MambaLM(config()).eval()
    with torch.no_grad():
        before = model(ids).logits
    model.resize_token_embeddings(60, mean_resizing=False)
    assert model(ids).logits.shape[-1] == 60
    assert model.lm_head.weight is model.backbone.embeddings.weight
    model.resize_token_embeddings(48)
    torch.testing.assert_close(model(ids).logits, before)


def test_negative_ids(lm):
    with pytest.raises(ConfigError, match="token id -1 is negative"):
        ensure_token_fits(lm, -1)


def test_sentencepiece_tokenizer(tmp_path):
    import sentencepiece

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"the red digit {n} is left of the blue digit {n * 7}" for n in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=90,
        model_type="bpe",
        byte_fallback=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = load_tokenizer(tmp_path)
    text = "the blue digit 7 is red"
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) >= 90
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved")(text, add_special_tokens=False).input_ids == ids


def test_no_tokenizer(tmp_path):
    with pytest.raises(
        MissingFileError, match=r"no tokenizer \(looked for tokenizer.json.*EleutherAI/gpt-neox-20b"
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    with pytest.raises(ConfigError, match="cannot load a tokenizer"):
        load_tokenizer(tmp_path)
