"""One loss, whatever the number of processes, the strategy and the micro-steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmamba.training.checkpoint import read_whole

Values = Callable[..., dict[str, Any]]
SETTINGS: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": "ddp"},
    "fsdp2": {"parallel": "fsdp2"},
    "fsdp2-full": {"parallel": "fsdp2", "sharding.shard": "full", "gradient_checkpointing": True},
    "fsdp2-hybrid": {"parallel": "fsdp2", "sharding.hybrid": True, "batch.micro_batch_size": 2},
    "fsdp2-frozen": {"parallel": "fsdp2", "sharding.shard_frozen": True, "batch.micro_batch_size": 1},
    "ddp-accumulated": {"parallel": "ddp", "batch.micro_batch_size": 1},
}


@pytest.fixture
def mixed_rows(task: Path, tmp_path: Path) -> str:
    """Four long rows with images and four short ones without: sorted by length, one rank gets text alone."""
    rows = json.loads((task / "rows.json").read_text())
    texts = [row for row in rows if "image" not in row]
    mixed = rows[:4] + [{**texts[i % 2], "id": f"text-{i}"} for i in range(4)]
    (tmp_path / "mixed.json").write_text(json.dumps(mixed))
    return str(tmp_path / "mixed.json")


def assert_close(first: dict[str, Any], second: dict[str, Any], what: str) -> None:
    assert first.keys() == second.keys()
    for name in first.keys() - {"images"}:
        torch.testing.assert_close(
            second[name], first[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{what}: {n}: {m}"
        )


@pytest.mark.parametrize("train", ["multi_modal_projector,language_model", "multi_modal_projector"])
def test_gradients(train: str, values: Values, ranks: Any, programs: Any, mixed_rows: str) -> None:
    """With text-only rows on one rank alone: no hang, and every gradient is that of one process."""
    changes = {
        "train": train,
        "data.sources.0.annotations": mixed_rows,
        "data.order": "length",
        "batch.global_batch_size": 8,
        "batch.micro_batch_size": 4,
    }
    (alone,) = programs.gradients([{"values": values(changes, output="alone")}])
    assert alone["multi_modal_projector.linear_1.weight"].abs().sum() > 0
    jobs = []
    for name, settings in SETTINGS.items():
        hosts = 2 if name == "fsdp2-hybrid" else 1
        jobs.append({"values": values({**changes, **settings}, output=name), "hosts": hosts})
    first, second = ranks("gradients", jobs)
    assert first.exitcode == second.exitcode == 0, first.output + second.output
    for name, *both in zip(SETTINGS, first.value, second.value, strict=True):
        if SETTINGS[name].get("batch.micro_batch_size", 4) == 4:
            assert [each["images"] for each in both] == [[True], [False]]
        for each in both:
            assert_close(alone, each, name)


@pytest.mark.ci
def test_bf16(values: Values, ranks: Any, programs: Any) -> None:
    """Blocks gathered in bf16, masters and reductions in fp32; what the scan reads in fp32 is whole and the same."""
    common = {"precision": "bf16", "optim.eps": 1e-3, "epochs": 1}
    alone = values(common, output="alone")
    (wanted,) = programs.train([{"values": alone}])
    settings = {"fsdp2": SETTINGS["fsdp2"], "fsdp2-full": SETTINGS["fsdp2-full"], "ddp": SETTINGS["ddp"]}
    jobs = [{"values": values({**common, **more}, output=name)} for name, more in settings.items()]
    first, second = ranks("train", jobs)
    assert first.exitcode == second.exitcode == 0, first.output + second.output
    reference, _ = read_whole(Path(alone["output"]) / "checkpoints" / "step-000005")
    for job, here, there in zip(jobs, first.value, second.value, strict=True):
        assert here["losses"] == there["losses"]
        assert here["losses"] == pytest.approx(wanted["losses"], abs=0.03)
        saved, _ = read_whole(Path(job["values"]["output"]) / "checkpoints" / "step-000005")
        assert saved.keys() == reference.keys()
        assert {t.dtype for t in saved.values()} == {torch.float32}

    # bf16 rounds each gradient; one that was not summed over the processes would be off by half.
    (exact,) = programs.gradients([{"values": values({**common, "precision": "fp32"}, output="exact")}])
    jobs = [{"values": values({**common, **more}, output=f"{name}-1")} for name, more in settings.items()]
    for end in ranks("gradients", jobs):
        assert end.exitcode == 0, end.output
        for name, found in zip(settings, end.value, strict=True):
            for key in exact.keys() - {"images", "loss", "norm"}:
                error = (found[key] - exact[key]).norm() / exact[key].norm()
                assert error < 0.15, (name, key, error)
