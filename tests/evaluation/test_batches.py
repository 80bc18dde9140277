"""Batches that shrink when memory runs out, and never change an answer."""

from __future__ import annotations

import logging

import pytest
import torch

from vlmamba.errors import ConfigError
from vlmamba.evaluation import runner
from vlmamba.evaluation.records import read_records
from vlmamba.evaluation.runner import BatchSize, evaluate
from vlmamba.testing import tiny_model


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["gpu", "host"],
)
def test_auto_goes_down_until_memory_suffices(task, tmp_path, monkeypatch, error, caplog):
    model, processor = tiny_model()
    evaluate(model, processor, task, tmp_path / "whole.jsonl", batch_size=1, progress=False)
    sizes = []
    generate = runner.generate_answers

    def small_memory(model, processor, questions, **options):
        sizes.append(len(questions))
        if len(questions) > 3:
            raise error
        return generate(model, processor, questions, **options)

    monkeypatch.setattr(runner, "generate_answers", small_memory)
    with caplog.at_level(logging.INFO, logger="vlmamba"):
        result = evaluate(model, processor, task, tmp_path / "a.jsonl", batch_size="auto", progress=False)
    assert sizes == [11, 6, 3, 3, 3, 2]
    assert result["settings"]["batch_size"] == 3
    assert "memory did not suffice for 6 questions at a time; going on with 3" in caplog.text
    assert read_records(tmp_path / "a.jsonl") == read_records(tmp_path / "whole.jsonl")
    with pytest.raises(
        ConfigError, match=r"a batch of 5 question\(s\) does not fit into the memory. Use batch_size"
    ):
        evaluate(model, processor, task, tmp_path / "b.jsonl", batch_size=5, progress=False)


def test_memory_that_is_too_small_for_one_question_is_an_error(task, tmp_path, monkeypatch):
    def nothing_fits(*arguments, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(runner, "generate_answers", nothing_fits)
    with pytest.raises(ConfigError, match=r"a batch of 1 question\(s\) does not fit into the memory"):
        evaluate(*tiny_model(), task, tmp_path / "a.jsonl", batch_size="auto", progress=False)


def test_other_errors_are_not_taken_for_a_lack_of_memory(task, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(runner, "generate_answers", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        evaluate(*tiny_model(), task, tmp_path / "a.jsonl", batch_size="auto", progress=False)


def test_batch_sizes():
    assert BatchSize("auto", "cuda").now > BatchSize("auto", "cpu").now == 32
    assert BatchSize(7).now == 7
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got many; or auto"):
        BatchSize("many")
