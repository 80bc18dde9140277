"""Sharding shows in what each process has allocated, by benchmarks/memory.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from vlmamba.testing.processes import run_ranks
from vlmamba.training.config import TrainConfig

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "memory.py"
SPARE = 3e6
"""Python objects and what else is not a tensor."""


@pytest.mark.ci
def test_shares(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("benchmark_memory", PROGRAM)
    assert spec is not None and spec.loader is not None
    memory: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(memory)
    common = memory.write_weights(tmp_path, "tiny")
    rows, length = memory.SIZES["tiny"][3:5]
    found: dict[str, dict[str, float]] = {}
    for name in ("ddp", "fsdp2"):
        values = {**common, **memory.STRATEGIES[name], "precision": "fp32"}
        values["batch"] = {"global_batch_size": 2 * rows, "micro_batch_size": rows}
        ends = run_ranks(PROGRAM, "measure", values, rows, length, folder=tmp_path / name)
        assert [end.exitcode for end in ends] == [0, 0], ends[0].output + ends[1].output
        found[name] = {key: max(end.value[key] for end in ends) for key in ends[0].value}
        _, trained = memory.planned(TrainConfig.from_dict(values), 2, rows, length)
    # Weights and two moments, all fp32; between steps DDP keeps its buckets of gradients too.
    assert found["ddp"]["between"] == pytest.approx(16 * trained, abs=SPARE)
    assert found["fsdp2"]["between"] == pytest.approx(12 * trained / 2, abs=SPARE)
    gradients = found["fsdp2"]["before update"] - found["fsdp2"]["between"]
    assert gradients <= 4 * trained / 2 + 4 * 1024 * 128 + SPARE, (
        "their half, and the largest piece on its way"
    )
