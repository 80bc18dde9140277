"""`generate` with everything it may be asked for: rows alone, beams, embeddings, caches from outside, stop strings."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DynamicCache

from vlmamba.errors import ShapeError
from vlmamba.models.language.cache import MambaCache
from vlmamba.models.language.versions import CACHE
from vlmamba.testing import tiny_model

RNG = np.random.default_rng(0)
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
LANGUAGES = ["mamba", "llama"]


def picture():
    return {"type": "image", "image": Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8))}


CHATS = [
    [{"role": "user", "content": [picture(), picture(), {"type": "text", "text": "\nWhich two?"}]}],
    [{"role": "user", "content": [picture(), {"type": "text", "text": "\nWhat?"}]}],
]


@pytest.fixture(scope="module", params=LANGUAGES)
def parts(request):
    """A model with opinions, its processor, and rows of two pictures and of one, together and alone."""
    model, processor = tiny_model(language=request.param)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.25 * torch.randn(parameter.shape, generator=generator))

    def encode(chats):
        return processor.apply_chat_template(
            chats, tokenize=True, add_generation_prompt=True, return_tensors="pt"
        )

    return model, processor, encode(CHATS), [encode([chat]) for chat in CHATS]


def fresh_cache(model):
    return (
        MambaCache()
        if model.config.text_config.model_type == "mamba"
        else DynamicCache(config=model.config.text_config)
    )


def new_tokens(model, batch, **options):
    return model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]


def test_rows_of_different_pictures_are_the_rows_alone(parts):
    model, _, both, alone = parts
    rows = [new_tokens(model, row, **GREEDY) for row in alone]
    assert not torch.equal(*rows)
    assert torch.equal(new_tokens(model, both, **GREEDY), torch.cat(rows))


@pytest.mark.parametrize("returned", [1, 2, 3])
def test_beams_are_the_beams_of_each_row_alone(parts, returned):
    model, _, both, alone = parts
    options = {
        **GREEDY,
        "num_beams": 3,
        "num_return_sequences": returned,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    whole = model.generate(**both, **options)
    rows = [model.generate(**row, **options) for row in alone]
    got = [row.sequences[:, batch["input_ids"].shape[1] :] for row, batch in zip(rows, alone, strict=True)]
    assert torch.equal(whole.sequences[:, both["input_ids"].shape[1] :], torch.cat(got))
    torch.testing.assert_close(
        whole.sequences_scores, torch.cat([row.sequences_scores for row in rows]), rtol=1e-4, atol=1e-5
    )


def test_several_samples_of_a_row_see_that_row_s_pictures(parts):
    """With one token to choose from, sampling is greedy: every copy of a row must say what the row says."""
    model, _, both, _ = parts
    greedy = new_tokens(model, both, **GREEDY)
    sampled = new_tokens(model, both, **{**GREEDY, "do_sample": True}, top_k=1, num_return_sequences=2)
    assert torch.equal(sampled, greedy.repeat_interleave(2, dim=0))


def test_a_batch_whose_pictures_do_not_fit_its_rows_is_refused(parts):
    model, _, both, _ = parts
    with pytest.raises(
        ShapeError, match=r"placeholders of \[2, 1\] image\(s\), 16 tokens each, but pixel_values hold 2"
    ):
        model.generate(**{**both, "pixel_values": both["pixel_values"][:2]}, **GREEDY, num_beams=2)


def test_generation_ends_with_a_stop_string(parts):
    model, processor, _, (_, row) = parts
    text = processor.decode(new_tokens(model, row, **GREEDY)[0])
    pairs = (text[start : start + 2] for start in range(2, len(text)))
    stop = next(pair for pair in pairs if pair.isascii() and pair.isprintable())  # no half of a character
    ids = new_tokens(model, row, **GREEDY, stop_strings=[stop], tokenizer=processor.tokenizer)[0]
    plain = new_tokens(model, row, **GREEDY)[0]
    said = processor.decode(ids)
    assert stop in said
    assert stop not in processor.decode(ids[:-1])
    assert torch.equal(ids, plain[: len(ids)])
    assert len(ids) < len(plain)


def test_hidden_states_of_every_step_are_those_of_the_whole(parts):
    model, _, _, (row, _) = parts
    options = {**GREEDY, "output_hidden_states": True, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(**row, **options)
    layers = model.config.text_config.num_hidden_layers + 1
    assert [len(step) for step in out.hidden_states] == [layers] * 8
    with torch.no_grad():
        whole = model(
            input_ids=out.sequences[:, :-1], pixel_values=row["pixel_values"], output_hidden_states=True
        )
        embeds = model.embed(out.sequences[:, :-1], row["pixel_values"])
        own = model.language_model(inputs_embeds=embeds, output_hidden_states=True).hidden_states
    torch.testing.assert_close(whole.hidden_states, own, rtol=1e-4, atol=1e-5)
    for layer in range(layers):
        steps = torch.cat([step[layer] for step in out.hidden_states], dim=1)
        torch.testing.assert_close(steps, whole.hidden_states[layer], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.stack(out.logits, dim=1), whole.logits[:, -8:], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_embeddings_with_pictures_in_them_are_as_good_as_ids(parts):
    model, _, both, _ = parts
    embeds = model.embed(both["input_ids"], both["pixel_values"])
    given = {"inputs_embeds": embeds, "attention_mask": both["attention_mask"]}
    assert torch.equal(model(**given).logits, model(**both).logits)
    for options in (GREEDY, {**GREEDY, "num_beams": 2, "num_return_sequences": 2}):
        assert torch.equal(model.generate(**given, **options), new_tokens(model, both, **options))
    kept = model.generate(input_ids=both["input_ids"], **given, **GREEDY)
    assert torch.equal(kept, model.generate(**both, **GREEDY))


def test_embeddings_and_what_they_hold_already_are_not_given_together(parts):
    model, _, both, _ = parts
    embeds = model.embed(both["input_ids"], both["pixel_values"])
    with pytest.raises(ShapeError, match="either input_ids or inputs_embeds"):
        model(input_ids=both["input_ids"], inputs_embeds=embeds)
    for call in (model, model.generate):
        with pytest.raises(ShapeError, match="pixel_values need input_ids"):
            call(inputs_embeds=embeds, pixel_values=both["pixel_values"])


@pytest.mark.parametrize("name", ["past_key_values", CACHE])
@torch.no_grad()
def test_a_cache_from_outside_is_filled_and_continued(parts, name):
    model, _, both, _ = parts
    whole = model.generate(**both, **GREEDY)
    length = both["input_ids"].shape[1]
    cache = fresh_cache(model)
    assert torch.equal(model.generate(**both, **GREEDY, **{name: cache}), whole)
    assert cache.get_seq_length() == length + 7
    prompt = fresh_cache(model)
    model(**both, **{name: prompt})
    mask = torch.cat([both["attention_mask"], torch.ones(2, 3, dtype=torch.long)], dim=1)
    options = {**GREEDY, "max_new_tokens": 5, "min_new_tokens": 5}
    again = model.generate(input_ids=whole[:, : length + 3], attention_mask=mask, **options, **{name: prompt})
    assert torch.equal(again, whole)


def test_a_cache_of_another_kind_is_refused(parts):
    model, _, both, _ = parts
    mamba = model.config.text_config.model_type == "mamba"
    other = DynamicCache() if mamba else MambaCache()
    says = (
        r"is a DynamicCache but Mamba(LM)? continues a MambaCache"
        if mamba
        else "is a MambaCache, but llama continues a"
    )
    for call in (
        lambda: model.generate(**both, **GREEDY, past_key_values=other),
        lambda: model(**both, cache=other),
    ):
        with pytest.raises(ShapeError, match=says):
            call()


def test_what_generate_cannot_do_exactly_it_says_by_name(parts):
    model, _, _, (row, _) = parts
    with pytest.raises(TypeError, match="does not take output_attentions"):
        model.generate(**row, **GREEDY, output_attentions=True, return_dict_in_generate=True)
    if model.config.text_config.model_type == "mamba":
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            model.generate(**row, **GREEDY, prompt_lookup_num_tokens=2)
