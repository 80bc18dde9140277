"""Evaluations of a model whose weights are cut: real generation in every process, in one alone, and one that fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmamba.training.metrics import read_log

Values = Callable[..., dict[str, Any]]
PROGRAM = """
import os
import torch

RANK = int(os.environ.get("RANK", "0"))

def answer(model, processor, *, step, everywhere=True):
    # Each process has a prompt of its own length and answers until its own end.
    if RANK and not everywhere:
        return None
    found = {}
    for length in range(3, 5 + 2 * RANK):
        ids = torch.tensor([[processor.image_token_id] * processor.num_image_tokens + [20 + RANK] * length])
        pixels = torch.ones(1, 3, 16, 16)
        made = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=4 + RANK, do_sample=False)
        found[f"ids_{length}"] = float(made[0, ids.shape[1]:].sum())
        found[f"logits_{length}"] = float(model(input_ids=ids, pixel_values=pixels).logits.float().abs().mean())
        # And a part of the model by itself, which no other process need call.
        model.language_model(inputs_embeds=torch.ones(1, 2, 32))
    return found

def broken(model, processor, *, step):
    if RANK == 1:
        raise ValueError("no pictures")
    return answer(model, processor, step=step)
"""
SETTINGS: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": "ddp"},
    "fsdp2": {"parallel": "fsdp2"},
    "fsdp2-full": {"parallel": "fsdp2", "sharding.shard": "full", "sharding.shard_frozen": True},
}
COMMON = {"save_every": 2, "optim.eps": 1e-3}


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "measure.py"
    path.write_text(PROGRAM)
    return path


def watched(program: Path, name: str = "answer", **options: Any) -> dict[str, Any]:
    return {"evaluations": [{"function": f"{program}:{name}", "every": 2, "options": options}]}


def numbers(output: str) -> list[dict[str, float]]:
    lines = read_log(Path(output) / "eval.jsonl")
    return [{key: line[key] for key in line if key.startswith(("ids", "logits"))} for line in lines]


def check(
    settings: dict[str, dict[str, Any]], values: Values, ranks: Any, programs: Any, program: Path
) -> None:
    alone = values({**COMMON, **watched(program)}, output="alone")
    (plain,) = programs.train([{"values": alone}])
    wanted = numbers(alone["output"])
    assert [len(each) for each in wanted] == [4, 4, 4]  # steps 2 and 4, and 5, the last

    def job(name: str, what: str, evaluation: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"values": values({**COMMON, **settings[name], **evaluation, **more}, output=f"{name}-{what}")}

    jobs = [job(name, "unequal", watched(program)) for name in settings]
    jobs += [job(name, "first", watched(program, everywhere=False)) for name in settings if name != "ddp"]
    jobs += [job(name, "bf16", watched(program), precision="bf16") for name in list(settings)[:2]]
    broken = [job(name, "broken", watched(program, "broken")) for name in list(settings)[-1:]]
    ends = ranks("train", [*jobs, *broken])
    assert [end.exitcode for end in ends] == [0, 0], ends[0].output + ends[1].output
    for job, *both in zip(jobs, *(end.value for end in ends), strict=False):
        output = job["values"]["output"]
        exact = not output.endswith("bf16")
        assert [each["outcome"] for each in both] == ["finished"] * 2, (output, both)
        for each in both:
            assert each["losses"] == pytest.approx(plain["losses"], abs=1e-5 if exact else 0.03), output
        found = numbers(output)
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            kept = one.keys() if exact else [key for key in one if key.startswith("logits")]
            for key in kept:
                assert one[key] == pytest.approx(other[key], rel=1e-4 if exact else 0.05), (output, key)
    for end in ends:
        for result in end.value[len(jobs) :]:
            assert result["outcome"] == "TrainingError", result
            assert "measure.py:broken failed on rank 1: ValueError: no pictures" in result["message"]


@pytest.mark.ci
def test_evaluations(values: Values, ranks: Any, programs: Any, program: Path) -> None:
    check(SETTINGS, values, ranks, programs, program)


def test_evaluations_under_deepspeed(
    zero: dict[str, dict[str, Any]], values: Values, ranks: Any, programs: Any, program: Path
) -> None:
    check(zero, values, ranks, programs, program)
