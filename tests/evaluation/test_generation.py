"""The harness's own decoding: transformers' greedy `generate`, with pictures run once for all of their questions."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vlmamba.errors import DataError
from vlmamba.evaluation import Sample, image_first
from vlmamba.evaluation.generation import (
    encode_question,
    generate_answers,
    picture_key,
    run_prompts,
    sample_answers,
)
from vlmamba.evaluation.runner import group_by_pictures
from vlmamba.evaluation.task import StoredImage
from vlmamba.testing import tiny_model


def talkative(**options):
    model, processor = tiny_model(**options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.25 * torch.randn(parameter.shape, generator=generator))
    return model, processor


def encode(processor, samples):
    return [encode_question(processor, s, image_first(s)) for s in samples]


def about_one_picture(task):
    """Questions of different lengths on the same picture, with a text-only one and other pictures between."""
    picture = task.samples[1].images
    texts = ["Where?", "How many digits are there? Two?", "What is in the image?"]
    shared = [Sample(f"p{i}", picture, text) for i, text in enumerate(texts)]
    return [shared[0], task.samples[0], shared[1], *task.samples[2:6], shared[2]]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"connector": "qmamba"},
        {"language": "llama"},
        {"language": "mistral"},
        {"language": "mamba2"},
        {"language": "jamba"},
        {"language": "qwen3_5_text"},
        {"chat": "plain"},
        {"chat": "zephyr"},
    ],
    ids=str,
)
def test_greedy_answers_are_those_of_generate(task, options):
    model, processor = talkative(**options)
    samples = about_one_picture(task)
    if options.get("chat") == "plain":  # nothing follows the picture
        empty = next(s for s in samples if not s.images)
        with pytest.raises(
            DataError, match="the prompt of question 0 is empty: the chat template leaves out"
        ):
            encode(processor, [empty])
        samples = [dataclasses.replace(s, text="<image>" * len(s.images)) for s in samples if s.images]
    questions = encode(processor, samples)
    own = generate_answers(model, processor, questions, max_new_tokens=12)
    for question, reply in zip(questions, own, strict=True):
        (theirs,) = sample_answers(model, processor, [question], max_new_tokens=12)
        (alone,) = generate_answers(model, processor, [question], max_new_tokens=12)
        assert reply == theirs == alone
    if options.get("language") in (None, "llama"):  # the others are too small to say much
        assert len({reply.text for reply in own}) > 3
    assert sample_answers(model, processor, questions, max_new_tokens=12) == own


def test_rows_that_ended_leave_the_batch(task, monkeypatch):
    model, processor = talkative()
    questions = encode(processor, task.samples)
    lengths = [r.tokens for r in generate_answers(model, processor, questions, max_new_tokens=40)]
    model.generation_config.eos_token_id = [0, *range(40, 330, 2)]  # end at half of the tokens
    short = generate_answers(model, processor, questions, max_new_tokens=40)
    assert {r.cut for r in short} == {False}
    assert sum(r.tokens for r in short) < sum(lengths)
    assert max(r.tokens for r in short) > 1
    rows = []
    forward = type(model).forward

    def counted(self, input_ids=None, **options):
        rows.append(input_ids.shape[0])
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(type(model), "forward", counted)
    assert generate_answers(model, processor, questions, max_new_tokens=40) == short
    assert rows[-1] <= len(questions) // 2
    assert [generate_answers(model, processor, [q], max_new_tokens=40)[0] for q in questions] == short


def test_a_picture_is_encoded_once_for_all_of_its_questions(task, monkeypatch):
    model, processor = talkative()
    seen = []
    tower = model.vision_tower.forward
    monkeypatch.setattr(
        model.vision_tower,
        "forward",
        lambda pixels, *a, **k: seen.append(pixels.shape[0]) or tower(pixels, *a, **k),
    )
    samples = about_one_picture(task)
    with torch.inference_mode():
        prompted = run_prompts(model, processor, encode(processor, samples))
    pictures = sum(len(s.images) for s in samples)
    assert seen == [pictures - 2]
    assert prompted.logits.shape[0] == prompted.mask.shape[0] == len(samples)


def test_questions_about_the_same_pictures_stay_together(task):
    pictures = [s.images for s in task.samples if s.images]
    samples = [Sample(i, pictures[i % 3], f"{i}") for i in range(7)] + [
        Sample(7, (), "a"),
        Sample(8, (), "b"),
    ]
    groups = group_by_pictures(samples)
    assert [[s.question_id for s in group] for group in groups] == [[0, 3, 6], [1, 4], [2, 5], [7], [8]]
    same = [Sample(0, (StoredImage("a", bytes),), ""), Sample(1, (StoredImage("a", bytes),), "")]
    assert picture_key(same[0]) == picture_key(same[1])
