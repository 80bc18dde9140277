"""One loss, whatever the number of processes, the strategy and the micro-steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Values = Callable[..., dict[str, Any]]
STRATEGIES = ["ddp", "fsdp2", "fsdp2-full", "fsdp2-hybrid"]
SETTINGS: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": "ddp"},
    "fsdp2": {"parallel": "fsdp2"},
    "fsdp2-full": {"parallel": "fsdp2", "sharding.shard": "full", "gradient_checkpointing": True},
    "fsdp2-hybrid": {"parallel": "fsdp2", "sharding.hybrid": True},
}


@pytest.fixture
def mixed_rows(task: Path, tmp_path: Path) -> str:
    """Four long rows with images and four short ones without: sorted by length, one rank gets text alone."""
    rows = json.loads((task / "rows.json").read_text())
    texts = [row for row in rows if "image" not in row]
    mixed = rows[:4] + [{**texts[i % 2], "id": f"text-{i}"} for i in range(4)]
    (tmp_path / "mixed.json").write_text(json.dumps(mixed))
    return str(tmp_path / "mixed.json")


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(
            second[name], tensor, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients(strategy: str, values: Values, ranks: Any, mixed_rows: str) -> None:
    """With text-only rows on one rank alone: no hang, and the connector's gradients are the same."""
    changes = {
        "data.sources.0.annotations": mixed_rows,
        "data.order": "length",
        "batch.global_batch_size": 8,
        "batch.micro_batch_size": 4,
    }
    (alone,) = ranks("gradients", values(changes, output="alone"), world_size=1)
    assert len(alone.value) > 10 and alone.value["multi_modal_projector.linear_1.weight"].abs().sum() > 0
    more = {"LOCAL_WORLD_SIZE": "1"} if strategy == "fsdp2-hybrid" else {}
    ends = ranks("gradients", values({**changes, **SETTINGS[strategy]}), environment=more)
    for end in ends:
        assert end.exitcode == 0, end.output
        assert_close(alone.value, end.value)
