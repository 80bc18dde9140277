"""Adapters and running means under every strategy: as in one process, and under bf16 the same run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vlmamba.training.checkpoint import complete_checkpoints, read_whole
from vlmamba.training.metrics import read_log

Values = Callable[..., dict[str, Any]]
LORA: dict[str, Any] = {
    "train": "multi_modal_projector",
    "lora": {"match": ["language_model.*.mixer.*"], "rank": 2},
    "optim.groups": [{"match": "*.lora_B.*", "lr": 4.0}],
    "optim.eps": 1e-3,  # keeps Adam from turning rounding into steps of full size
    "batch.micro_batch_size": 1,
    "ema": 0.8,
    "epochs": 1,
    "save_every": 2,
    "keep_last": 0,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": "ddp"},
    "fsdp2": {"parallel": "fsdp2"},
    "fsdp2-full": {"parallel": "fsdp2", "sharding.shard": "full", "gradient_checkpointing": True},
}


def tensors(output: str) -> dict[str, torch.Tensor]:
    """Weights, moments and means at the end of a run."""
    newest = complete_checkpoints(Path(output))[-1]
    assert newest.name == "step-000005"
    weights, state = read_whole(newest)
    return weights | {f"{n}/{k}": v for n, values in state.items() for k, v in values.items()}


def exported(output: str) -> dict[str, torch.Tensor]:
    """Merged weights, adapter and merged means."""
    files = ("export/model.safetensors", "export/adapter/adapter_model.safetensors")
    files += ("export_ema/model.safetensors",)
    return {f"{file}: {n}": t for file in files for n, t in load_file(Path(output) / file).items()}


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], what: str) -> None:
    assert found.keys() == wanted.keys(), what
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{what}: {n}: {m}"
        )


@pytest.mark.ci
def test_gradients_weights_means_and_exports(values: Values, ranks: Any, programs: Any) -> None:
    alone = values(LORA, output="alone")
    (wanted,) = programs.gradients([{"values": {**alone, "output": alone["output"] + "-1"}}])
    assert any(".lora_B." in name for name in wanted) and wanted.pop("images")
    programs.train([{"values": alone}])
    weights, export = tensors(alone["output"]), exported(alone["output"])
    assert any(name.endswith("lora_A.default.weight/ema") for name in weights)
    assert not any(".lora_" in name for name in export if "adapter" not in name)

    jobs = [{"values": values({**LORA, **more}, output=name)} for name, more in SETTINGS.items()]
    first = [{"values": values({**LORA, **more}, output=f"{name}-1")} for name, more in SETTINGS.items()]
    for end in ranks("several", [("gradients", first), ("train", jobs)]):
        assert end.exitcode == 0, end.output
        for name, found in zip(SETTINGS, end.value[0], strict=True):
            del found["images"]
            assert_close(found, wanted, f"{name}, gradients")
    for name, job in zip(SETTINGS, jobs, strict=True):
        assert_close(tensors(job["values"]["output"]), weights, name)
        assert_close(exported(job["values"]["output"]), export, f"{name}, export")


@pytest.mark.ci
def test_bf16_resumes_exactly(values: Values, ranks: Any, programs: Any) -> None:
    """Adapters in fp32 inside blocks whose own weights are bf16; broken off after step 3, continued from step 2."""
    common = {**LORA, "precision": "bf16"}
    (wanted,) = programs.train([{"values": values(common, output="alone")}])
    whole = [{"values": values({**common, **more}, output=name)} for name, more in SETTINGS.items()]
    halves = [{"values": values({**common, **more}, output=f"{name}-2")} for name, more in SETTINGS.items()]
    calls = [
        ("train", whole),
        ("train", [{**half, "stop_after": 3} for half in halves]),
        ("train", [{**half, "resume": True} for half in halves]),
    ]
    ends = ranks("several", calls)
    assert [end.exitcode for end in ends] == [0, 0], ends[0].output + ends[1].output
    for job, half, result in zip(whole, halves, ends[0].value[0], strict=True):
        assert result["losses"] == pytest.approx(wanted["losses"], abs=0.03)
        outputs = job["values"]["output"], half["values"]["output"]
        one, other = (tensors(output) for output in outputs)
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []
        logs = [[line["loss"] for line in read_log(Path(output) / "log.jsonl")] for output in outputs]
        assert logs[0] == logs[1] and len(logs[0]) == 5, json.dumps(logs)
