"""Cached decoding through transformers' own `generate`."""

from __future__ import annotations

import pytest
import torch

from vlmamba.errors import ShapeError
from vlmamba.models.language.cache import MambaCache

LENGTHS = (4, 11, 7)


def padded(ids: torch.Tensor, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.full_like(ids, 9)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        where = slice(0, length) if side == "right" else slice(ids.shape[1] - length, None)
        out[row, where] = ids[row, :length]
        mask[row, where] = 1
    return out, mask


def generate(model, ids, **options):
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(ids, **options)


def test_greedy_equals_transformers_token_for_token(pair, ids):
    ours, theirs = pair
    got = generate(ours, ids)
    assert torch.equal(got, generate(theirs, ids))
    assert len(set(got[:, 11:].flatten().tolist())) > 5, (
        "the text of the test model is too dull to prove anything"
    )


def test_greedy_equals_uncached(lm, ids):
    assert torch.equal(generate(lm, ids), generate(lm, ids, use_cache=False))


def test_sampling_equals_transformers_with_the_same_seed(pair, ids):
    results = []
    for model in pair:
        torch.manual_seed(3)
        results.append(generate(model, ids, do_sample=True, temperature=0.7, top_k=20))
    assert torch.equal(*results)


def test_beams_equal_transformers(pair, ids):
    ours, theirs = (generate(model, ids, num_beams=4, num_return_sequences=2) for model in pair)
    assert torch.equal(ours, theirs)


def test_beams_need_the_reordering(lm, ids, monkeypatch):
    right = generate(lm, ids, num_beams=4)
    monkeypatch.setattr(MambaCache, "reorder_cache", lambda self, beam_idx: None)
    assert not torch.equal(generate(lm, ids, num_beams=4), right)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("beams", [1, 3])
def test_batch_equals_singles(lm, ids, side, beams):
    batch, mask = padded(ids, side)
    together = generate(lm, batch, attention_mask=mask, num_beams=beams)[:, 11:]
    for row, length in enumerate(LENGTHS):
        alone = generate(lm, ids[row : row + 1, :length], num_beams=beams)[:, length:]
        assert torch.equal(together[row : row + 1], alone)


def test_left_padded_equals_transformers(pair, ids):
    batch, mask = padded(ids, "left")
    ours, theirs = (generate(model, batch, attention_mask=mask) for model in pair)
    assert torch.equal(ours, theirs)


def test_from_embeddings(lm, ids):
    batch, mask = padded(ids, "left")
    embeds = lm.get_input_embeddings()(batch)
    expected = generate(lm, batch, attention_mask=mask)[:, 11:]
    got = generate(lm, None, inputs_embeds=embeds, attention_mask=mask)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_chunked_prefill(lm, ids, chunk):
    batch, mask = padded(ids, "left")  # a row's first chunk is padding only
    expected = generate(lm, batch, attention_mask=mask)
    assert torch.equal(generate(lm, batch, attention_mask=mask, prefill_chunk_size=chunk), expected)


@pytest.mark.parametrize("cuts", [(5,), (1, 2), (10,), (3, 4, 9)])
def test_split_equals_whole(lm, ids, cuts):
    whole = lm(ids, use_cache=True)
    cache, parts, start = MambaCache(), [], 0
    for end in (*cuts, 11):
        out = lm(ids[:, start:end], past_key_values=cache, use_cache=True)
        parts.append(out.logits)
        cache, start = out.past_key_values, end
    near = {"atol": 4e-6, "rtol": 4e-6}  # products of other shapes add up in other orders: 7e-7 without AVX2
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.logits, **near)
    for a, b in zip(cache.state.layers, whole.cache_params.state.layers, strict=True):
        torch.testing.assert_close(a.conv, b.conv, **near)
        torch.testing.assert_close(a.ssm, b.ssm, **near)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_second_turn_of_unequal_lengths(lm, ids, side):
    """A cache continued by several padded tokens, one row getting none."""
    first, mask = padded(ids, side)
    cache = lm(first, attention_mask=mask, use_cache=True).past_key_values
    second = torch.tensor([[21, 22, 23], [9, 9, 9], [31, 9, 9]])
    second_mask = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0]])
    if side == "left":
        second, second_mask = second.flip(1), second_mask.flip(1)
    lm(second, attention_mask=second_mask, past_key_values=cache)
    assert cache.get_seq_length() == 14
    after = lm(torch.tensor([[40], [40], [40]]), past_key_values=cache, use_cache=False).logits[:, -1]
    for row, length in enumerate(LENGTHS):
        text = [*ids[row, :length].tolist(), *second[row][second_mask[row] == 1].tolist(), 40]
        torch.testing.assert_close(after[row], lm(torch.tensor([text])).logits[0, -1], atol=1e-5, rtol=1e-5)


def test_continuing_with_a_users_cache(lm, ids):
    whole = generate(lm, ids)
    cache = lm(ids[:, :6], use_cache=True).past_key_values
    kept = cache.clone()
    assert torch.equal(generate(lm, ids, past_key_values=cache), whole)
    assert kept.get_seq_length() == 6
    assert torch.equal(generate(lm, ids, past_key_values=kept), whole)


def test_cache_operations(lm, ids):
    cache = lm(ids, use_cache=True).past_key_values
    step = torch.tensor([[5], [6], [7]])
    wanted = lm(step, past_key_values=cache.clone()).logits
    cache.batch_repeat_interleave(2)
    twice = lm(step.repeat_interleave(2, 0), past_key_values=cache.clone()).logits
    torch.testing.assert_close(twice, wanted.repeat_interleave(2, 0))
    cache.batch_select_indices(torch.tensor([0, 4]))
    torch.testing.assert_close(lm(step[[0, 2]], past_key_values=cache).logits, wanted[[0, 2]])
    with pytest.raises(ShapeError, match="holds states of 2 rows but the input has 3 rows"):
        lm(step, past_key_values=cache)
    with pytest.raises(ShapeError, match="state of 12 tokens cannot be cropped to 4"):
        cache.crop(4)
    cache.reset()
    torch.testing.assert_close(lm(ids[:2], past_key_values=cache).logits, lm(ids[:2]).logits)


def test_packed_rows_are_not_generated_from(lm, ids):
    with pytest.raises(ShapeError, match="pass them as padded rows, without seq_idx"):
        generate(lm, ids, seq_idx=torch.zeros_like(ids))


def test_bf16_model_and_autocast(lm, ids):
    import copy

    wanted = lm(ids).logits
    half = copy.deepcopy(lm).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        close = lm(ids, labels=ids)
        text = generate(lm, ids)
    close.loss.backward()
    assert {parameter.grad.dtype for parameter in lm.parameters()} == {torch.float32}
    scale = wanted.abs().max()
    assert (close.logits - wanted).abs().max() < 0.03 * scale
    assert (half(ids).logits - wanted).abs().max() < 0.03 * scale
    assert generate(half, ids).shape == text.shape == (3, 23)


def test_streaming(lm, ids):
    pieces = []

    class Streamer:
        def put(self, value):
            pieces.append(value.flatten().tolist())

        def end(self):
            pieces.append("end")

    out = generate(lm, ids[:1], streamer=Streamer())
    assert pieces[-1] == "end"
    assert [token for piece in pieces[:-1] for token in piece] == out[0].tolist()
