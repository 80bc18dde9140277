from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from vlmamba.errors import ConfigError, DataError, ImageError
from vlmamba.evaluation import Sample, Task, runner
from vlmamba.evaluation.records import read_records
from vlmamba.evaluation.runner import converse, evaluate, model_fingerprint
from vlmamba.testing import tiny_model


def talkative_model(**options):
    """A tiny model whose answers depend on question and pictures, and end at different lengths."""
    model, processor = tiny_model(**options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.25 * torch.randn(parameter.shape, generator=generator))
    return model, processor


def answers(path: Path) -> dict:
    return {
        record["question_id"]: (record["text"], record["metadata"]["tokens"]) for record in read_records(path)
    }


@pytest.mark.parametrize("connector", ["mlp", "qmamba"])
def test_batched_answers_equal_single_ones(task, tmp_path, connector):
    model, processor = talkative_model(connector=connector)
    results = {}
    for size in (1, 3, 32):
        path = tmp_path / f"{size}.jsonl"
        results[size] = evaluate(model, processor, task, path, batch_size=size, progress=False)
    single = answers(tmp_path / "1.jsonl")
    assert len(set(single.values())) > 4  # else equality would say little
    assert answers(tmp_path / "3.jsonl") == answers(tmp_path / "32.jsonl") == single
    assert results[1]["metrics"] == results[32]["metrics"]
    assert results[1]["counts"] == {"asked": 11, "answered": 11, "missing": 0, **_rest(results[1])}


def _rest(result):
    return {key: result["counts"][key] for key in ("unparsable", "cut", "resumed")}


def test_answers_follow_pictures_and_the_blind_baseline_swaps_them(task, tmp_path):
    model, processor = talkative_model()
    one = dataclasses.replace(task, samples=[s for s in task.samples if len(s.images) == 1])
    evaluate(model, processor, one, tmp_path / "a.jsonl", progress=False)
    result = evaluate(model, processor, one, tmp_path / "b.jsonl", shuffle_images=True, progress=False)
    assert result["settings"]["shuffle_images"] is True
    records = read_records(tmp_path / "b.jsonl")
    images = {s.question_id: s.images for s in one.samples}
    assert all(images[r["question_id"]] != images[r["metadata"]["images_from"]] for r in records)
    assert answers(tmp_path / "a.jsonl") != answers(tmp_path / "b.jsonl")


def test_a_stopped_evaluation_goes_on_where_it_was(task, tmp_path, monkeypatch):
    model, processor = talkative_model()
    whole = evaluate(model, processor, task, tmp_path / "whole.jsonl", batch_size=3, progress=False)
    asked: list = []
    generate = runner.generate_answers

    def counting(model, processor, questions, **options):
        if len(asked) == 6:
            raise KeyboardInterrupt
        asked.extend(q.sample.key for q in questions)
        return generate(model, processor, questions, **options)

    path = tmp_path / "stopped.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(runner, "generate_answers", counting)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, processor, task, path, batch_size=3, progress=False)
    path.write_bytes(path.read_bytes()[:-20])  # and the last line was cut
    assert len(read_records(path)) == 5
    resumed = evaluate(model, processor, task, path, batch_size=2, progress=False)
    assert resumed["counts"]["resumed"] == 5
    assert answers(path) == answers(tmp_path / "whole.jsonl")
    assert len(read_records(path)) == 11
    assert resumed["metrics"] == whole["metrics"]
    again = evaluate(model, processor, task, path, progress=False)
    assert again["counts"]["resumed"] == 11


def test_a_limit_can_be_raised_later(task, tmp_path):
    model, processor = tiny_model()
    path = tmp_path / "a.jsonl"
    few = evaluate(model, processor, task, path, limit=4, progress=False)
    assert few["counts"]["asked"] == few["metrics"]["overall"]["total"] == 4
    more = evaluate(model, processor, task, path, limit=7, progress=False)
    assert (more["counts"]["asked"], more["counts"]["resumed"]) == (7, 4)


def test_answers_of_another_model_or_setting_are_not_mixed_in(task, tmp_path):
    model, processor = tiny_model()
    path = tmp_path / "a.jsonl"
    evaluate(model, processor, task, path, limit=3, progress=False)
    other, _ = tiny_model(seed=1)
    assert model_fingerprint(other) != model_fingerprint(model) == model_fingerprint(tiny_model()[0])
    for changed in ({"model": other}, {"shuffle_images": True}):
        with pytest.raises(DataError, match=r"holds 3 answer\(s\) given by another model, data or settings"):
            evaluate(
                **{
                    "model": model,
                    "processor": processor,
                    "task": task,
                    "output": path,
                    "progress": False,
                    **changed,
                }
            )
    assert len(read_records(path)) == 3


def test_missing_pictures_are_counted_before_anything_is_asked(task, tmp_path):
    model, processor = tiny_model()
    (tmp_path / "images/0002.png").unlink()
    with pytest.raises(
        ImageError,
        match=r"1 picture\(s\) that the questions need are missing, such as .*0002\.png \(question 2\)",
    ):
        evaluate(model, processor, task, tmp_path / "a.jsonl", progress=False)
    assert not (tmp_path / "a.jsonl").exists()
    (tmp_path / "images/0002.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(ImageError, match=r"question \d+: image .*0002\.png"):
        evaluate(model, processor, task, tmp_path / "a.jsonl", progress=False)


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"limit": 0}])
def test_sizes_must_be_positive(task, tmp_path, bad):
    with pytest.raises(ConfigError, match=f"{next(iter(bad))} must be at least 1, got 0"):
        evaluate(*tiny_model(), task, tmp_path / "a.jsonl", **bad)


def test_sampling_settings_of_the_model_are_not_used_and_its_mode_is_kept(tmp_path):
    model, processor = talkative_model()
    task = Task("t", [Sample(0, (), "Where is the seven?", "x")], max_new_tokens=5)
    evaluate(model, processor, task, tmp_path / "a.jsonl", progress=False)
    model.generation_config.do_sample, model.generation_config.temperature = True, 3.0
    model.train()
    evaluate(model, processor, task, tmp_path / "b.jsonl", progress=False)
    assert model.training
    assert answers(tmp_path / "a.jsonl") == answers(tmp_path / "b.jsonl")


def test_a_conversation_carries_its_earlier_answers(task):
    model, processor = talkative_model()
    same = [dataclasses.replace(s, images=task.samples[1].images) for s in task.samples[:3]]
    replies = converse(model, processor, same, max_new_tokens=6)
    first = runner.encode_question(processor, same[0], runner.image_first(same[0]))
    assert replies[0] == runner.generate_answers(model, processor, [first], max_new_tokens=6)[0]
    assert len(replies) == 3
    assert json.dumps([r.text for r in replies])
