"""Options scored from a shared prompt state, against the plain way: each option behind the whole prompt."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from vlmamba.errors import DataError
from vlmamba.evaluation import Sample, Task, image_first
from vlmamba.evaluation.generation import Question, encode_question, generate_answers, model_inputs
from vlmamba.evaluation.likelihood import encode_options, score_options
from vlmamba.evaluation.records import read_records
from vlmamba.evaluation.runner import evaluate
from vlmamba.evaluation.scorers import Score, rate
from vlmamba.testing import tiny_model

OPTIONS = (
    ("red square", "blue", "two dots in the picture", "7"),
    ("yes", "no"),
    ("top left", "top", "a green circle and a yellow line"),
)


def sharpened(**options):
    """A tiny model with opinions."""
    model, processor = tiny_model(**options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model, processor


def encoded(processor, task):
    """Every sample of the task (with pictures, one or two, and without) with options."""
    return [encode_options(processor, s, image_first(s), OPTIONS[i % 3]) for i, s in enumerate(task.samples)]


def plain(model, processor, question):
    """Sum of log-probabilities of every option, each in a pass of its own over prompt and option."""
    totals = []
    for option in question.options:
        whole = Question(question.sample, question.input_ids + option)
        with torch.inference_mode():
            logits = model(**model_inputs(model, processor, [whole]), logits_to_keep=0).logits[0]
        start = len(question.input_ids) - 1
        chosen = logits.double().log_softmax(-1)[range(start, start + len(option)), option]
        totals.append(chosen.sum().item())
    return totals


@pytest.mark.parametrize(
    "options",
    [{}, {"connector": "qmamba"}, {"language": "llama"}, {"language": "gemma2"}, {"language": "jamba"}],
    ids=str,
)
def test_a_shared_state_gives_the_plain_likelihoods(task, options):
    model, processor = sharpened(**options)
    questions = encoded(processor, task)
    for scores, question in zip(score_options(model, processor, questions), questions, strict=True):
        expected = plain(model, processor, question)
        assert [s.total for s in scores] == pytest.approx(expected, abs=1e-5)
        lengths = [len(option) for option in question.options]
        assert [s.mean for s in scores] == pytest.approx(
            [total / length for total, length in zip(expected, lengths, strict=True)], abs=1e-5
        )
        assert [s.tokens for s in scores] == lengths
        assert len({round(total, 2) for total in expected}) == len(expected)


def test_likelihoods_do_not_depend_on_the_batch(task):
    model, processor = sharpened()
    questions = encoded(processor, task)
    together = score_options(model, processor, questions)
    for question, scores in zip(questions, together, strict=True):
        (alone,) = score_options(model, processor, [question])
        assert [s.total for s in alone] == pytest.approx([s.total for s in scores], abs=1e-5)


def test_what_greedy_generation_begins_with_is_marked(task):
    model, processor = sharpened()
    sample = task.samples[1]
    question = encode_question(processor, sample, image_first(sample))
    (reply,) = generate_answers(model, processor, [question], max_new_tokens=3)
    with torch.inference_mode():
        logits = model(**model_inputs(model, processor, [question]), logits_to_keep=1).logits[0, -1]
    first = int(logits.argmax())
    options = ([first], [first, 5], [(first + 1) % 300])
    (scores,) = score_options(model, processor, [question._replace(options=options)])
    assert [scores[0].greedy, scores[2].greedy] == [True, False]
    assert scores[0].total == pytest.approx(logits.log_softmax(-1)[first].item(), abs=1e-5)
    assert reply.tokens == 3


def test_options_stand_as_in_an_answer_without_its_end(task):
    _, processor = tiny_model()
    sample = task.samples[0]
    question = encode_options(processor, sample, image_first(sample), ["red square"])
    answer = [*image_first(sample), {"role": "assistant", "content": "red square"}]
    whole = processor.encode_messages(answer)
    supervised = [label for label in whole.labels if label != -100]
    assert question.input_ids + list(question.options[0]) == whole.input_ids[:-1]
    assert list(question.options[0]) == supervised[:-1]
    assert supervised[-1] == processor.tokenizer.eos_token_id


def likelihood_task(task, **changes):
    samples = [dataclasses.replace(s, options=OPTIONS[i % 3]) for i, s in enumerate(task.samples)]

    def score(samples, records):
        shares = [math.exp(r["metadata"]["scores"][0]) if r else 0.0 for r in records]
        right = [r is not None and r["text"] == s.options[0] for s, r in zip(samples, records, strict=True)]
        return Score({"overall": rate(sum(right), len(right)), "first": shares}, right, 0)

    return Task("ranked", samples, method="likelihood", reads="record", score=score, **changes)


@pytest.mark.parametrize("normalised", [False, True])
def test_a_task_is_ranked_by_likelihood(task, tmp_path, normalised):
    model, processor = sharpened()
    ranked = likelihood_task(task, normalised=normalised)
    results = {}
    for size in (1, 4, "auto"):
        path = tmp_path / f"{size}.jsonl"
        results[size] = evaluate(model, processor, ranked, path, batch_size=size, progress=False)
    texts = {size: [r["text"] for r in read_records(tmp_path / f"{size}.jsonl")] for size in results}
    assert texts[1] == texts[4] == texts["auto"]
    assert results["auto"]["settings"]["batch_size"] == 32
    assert results[1]["settings"]["rank_by"] == ("mean" if normalised else "sum")
    for record, sample in zip(read_records(tmp_path / "1.jsonl"), ranked.samples, strict=True):
        question = encode_options(processor, sample, image_first(sample), sample.options)
        expected = plain(model, processor, question)
        if normalised:
            expected = [e / len(o) for e, o in zip(expected, question.options, strict=True)]
        assert record["metadata"]["scores"] == pytest.approx(expected, abs=1e-5)
        assert record["text"] == sample.options[max(range(len(expected)), key=expected.__getitem__)]
    with pytest.raises(DataError, match=r"holds 11 answer\(s\) given by another model, data or settings"):
        other = likelihood_task(task, normalised=not normalised)
        evaluate(model, processor, other, tmp_path / "1.jsonl", progress=False)


def test_options_that_cannot_be_scored_are_named():
    _, processor = tiny_model()
    sample = Sample("q7", (), "Where?")
    with pytest.raises(DataError, match="question 'q7' has no options to score"):
        encode_options(processor, sample, image_first(sample), [])
    with pytest.raises(DataError, match="question 'q7': option '' has no token"):
        encode_options(processor, sample, image_first(sample), ["red", ""])
    processor.chat_template = (
        "{{ 'Q' if messages | length > 1 else 'P' }}{{ messages[0].content[0].text }}"
        "{% if messages | length > 1 %}{% generation %}{{ messages[1].content }}{% endgeneration %}{% endif %}"
    )
    with pytest.raises(DataError, match="question 'q7': the chat template writes the prompt differently"):
        encode_options(processor, sample, image_first(sample), ["red"])
