"""Adapters and running means under every strategy: as in one process, and under bf16 the same run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmamba.training.checkpoint import latest_checkpoint, read_whole

Values = Callable[..., dict[str, Any]]
LORA: dict[str, Any] = {
    "train": "multi_modal_projector",
    "lora": {"match": ["language_model.*.mixer.*"], "rank": 2},
    "epochs": 1,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": "ddp"},
    "fsdp2": {"parallel": "fsdp2"},
    "fsdp2-full": {"parallel": "fsdp2", "sharding.shard": "full", "gradient_checkpointing": True},
}


def test_gradients(values: Values, ranks: Any, programs: Any) -> None:
    (alone,) = programs.gradients([{"values": values(LORA, output="alone")}])
    assert any(".lora_B." in name for name in alone)
    jobs = [{"values": values({**LORA, **more}, output=name)} for name, more in SETTINGS.items()]
    for end in ranks("gradients", jobs):
        assert end.exitcode == 0, end.output
        for name, found in zip(SETTINGS, end.value, strict=True):
            assert found.keys() == alone.keys()
            for key in alone.keys() - {"images"}:
                torch.testing.assert_close(found[key], alone[key], atol=1e-5, rtol=1e-5, msg=f"{name}: {key}")


def test_bf16_beside_frozen_weights(values: Values, ranks: Any, programs: Any) -> None:
    """Adapters in fp32 inside blocks whose own weights are bf16."""
    common = {**LORA, "precision": "bf16"}
    (wanted,) = programs.train([{"values": values(common, output="alone")}])
    jobs = [{"values": values({**common, **more}, output=name)} for name, more in SETTINGS.items()]
    first, second = ranks("train", jobs)
    assert first.exitcode == second.exitcode == 0, first.output + second.output
    for job, result in zip(jobs, first.value, strict=True):
        assert result["losses"] == pytest.approx(wanted["losses"], abs=0.03)
        newest = latest_checkpoint(Path(job["values"]["output"]))
        assert newest is not None
        saved, _ = read_whole(newest)
        assert any(".lora_A." in name for name in saved)


def test_mean_of_the_weights(values: Values, ranks: Any, programs: Any) -> None:
    common = {"epochs": 1, "ema": 0.8}
    alone = values(common, output="alone")
    programs.train([{"values": alone}])
    newest = latest_checkpoint(Path(alone["output"]))
    assert newest is not None
    _, wanted = read_whole(newest)
    jobs = [{"values": values({**common, **more}, output=name)} for name, more in SETTINGS.items()]
    for end in ranks("train", jobs):
        assert end.exitcode == 0, end.output
    for job in jobs:
        newest = latest_checkpoint(Path(job["values"]["output"]))
        assert newest is not None
        _, found = read_whole(newest)
        for name, state in wanted.items():
            torch.testing.assert_close(found[name]["ema"], state["ema"], atol=2e-3, rtol=1e-3)
