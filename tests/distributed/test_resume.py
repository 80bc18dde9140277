"""Checkpoints go from any strategy and number of processes to any other, and exports are the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vlmamba.errors import CheckpointError
from vlmamba.training.checkpoint import complete_checkpoints, latest_checkpoint, read_whole
from vlmamba.training.metrics import read_log
from vlmamba.training.run import export_run

Values = Callable[..., dict[str, Any]]
SETTINGS: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": "ddp"},
    "fsdp2": {"parallel": "fsdp2"},
    "fsdp2-async": {"parallel": "fsdp2", "sharding.shard": "full", "save_async": True},
    "ddp-async": {"parallel": "ddp", "save_async": True},
}
# A large eps keeps Adam from turning rounding into steps of full size.
COMMON = {"epochs": 2, "save_every": 3, "keep_last": 0, "optim.eps": 1e-3, "batch.micro_batch_size": 1}


def losses(run_dir: str) -> list[float]:
    return [line["loss"] for line in read_log(Path(run_dir) / "log.jsonl")]


def tensors(run_dir: str) -> dict[str, torch.Tensor]:
    newest = latest_checkpoint(Path(run_dir))
    assert newest is not None and newest.name == "step-000010"
    weights, moments = read_whole(newest)
    return weights | {f"{n}/{k}": v for n, values in moments.items() for k, v in values.items()}


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], what: str) -> None:
    assert first.keys() == second.keys(), what
    for name, tensor in first.items():
        torch.testing.assert_close(
            second[name], tensor, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{what}: {n}: {m}"
        )


@pytest.mark.parametrize(
    ("sources", "targets"),
    [
        (["ddp", "fsdp2-async"], ["fsdp2", "single"]),
        pytest.param([*SETTINGS, "single"], [*SETTINGS, "single"], marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
@pytest.mark.ci
def test_every_strategy_goes_on_from_every_other(
    sources: list[str], targets: list[str], values: Values, ranks: Any, programs: Any
) -> None:
    whole = values(COMMON, output="whole")
    programs.train([{"values": whole}])
    reference = losses(whole["output"])
    assert len(reference) == 10

    # Broken off after step 7, whose checkpoint is that of step 6: in the middle of the second epoch.
    begun = {
        name: values({**COMMON, **more}, output=f"begun-{name}")
        for name, more in SETTINGS.items()
        if name in sources
    }
    ends = ranks("train", [{"values": each, "stop_after": 7} for each in begun.values()])
    assert [end.exitcode for end in ends] == [0, 0], ends[0].output + ends[1].output
    for name, each in begun.items():
        folder = Path(each["output"]) / "checkpoints"
        assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-000003", "step-000006"], name
        sharded = (folder / "step-000006" / "shards").is_dir()
        assert sharded == name.startswith("fsdp2")
        assert len(torch.load(folder / "step-000006" / "rng.pt", weights_only=True)) == 2

    if "single" in sources:
        begun["single"] = values(COMMON, output="begun-single")
        programs.train([{"values": begun["single"], "stop_after": 7}])

    jobs, alone = [], []
    for source, each in begun.items():
        for target in targets:
            more = SETTINGS.get(target, {})
            output = f"{source}-to-{target}"
            job = {"values": values({**COMMON, **more}, output=output), "resume": True}
            shutil.copytree(each["output"], job["values"]["output"])
            (alone if target == "single" else jobs).append(job)
    ends = ranks("train", jobs)
    assert [end.exitcode for end in ends] == [0, 0], ends[0].output + ends[1].output
    programs.train(alone)
    wanted = tensors(whole["output"])
    exported = load_file(Path(whole["output"]) / "export" / "model.safetensors")
    for job in [*jobs, *alone]:
        output = job["values"]["output"]
        assert losses(output) == pytest.approx(reference, abs=1e-5), output
        assert_close(wanted, tensors(output), output)
        assert_close(exported, load_file(Path(output) / "export" / "model.safetensors"), output)
        connector = load_file(Path(output) / "export" / "connector.safetensors")
        assert connector.keys() == load_file(Path(whole["output"]) / "export/connector.safetensors").keys()


def test_shards_are_parts(values: Values, ranks: Any, tmp_path: Path) -> None:
    """No process writes the whole; a run that was broken off is exported all the same; damage is named."""
    each = values({"parallel": "fsdp2", "max_steps": 4, "keep_last": 1, "keep_every": 2, "save_every": 1})
    ends = ranks("train", [{"values": each}])
    assert [end.exitcode for end in ends] == [0, 0], ends[0].output + ends[1].output
    run_dir = Path(each["output"])
    assert [p.name for p in complete_checkpoints(run_dir)] == ["step-000002", "step-000004"]
    newest = latest_checkpoint(run_dir)
    assert newest is not None
    parts = [p.stat().st_size for p in (newest / "shards").glob("*.safetensors")]
    assert len(parts) == 2 and max(parts) < 0.7 * sum(parts)
    export = export_run(run_dir, tmp_path / "again")
    first, second = (load_file(p / "model.safetensors") for p in (run_dir / "export", export))
    assert_close(first, second, "export")
    next(iter((newest / "shards").glob("*.safetensors"))).unlink()
    with pytest.raises(
        CheckpointError, match=r"of-00002.safetensors is missing. Continue from an older checkpoint"
    ):
        export_run(run_dir, tmp_path / "damaged")


def test_bad_rows_of_every_rank_are_counted(values: Values, ranks: Any, task: Path, tmp_path: Path) -> None:
    rows = json.loads((task / "rows.json").read_text())
    for index in (2, 5, 9, 13):
        rows[index]["image"] = f"not-there-{index}.png"
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    each = values(
        {
            "parallel": "ddp",
            "data.sources.0.annotations": str(tmp_path / "bad.json"),
            "data.max_bad_fraction": 0.5,
        }
    )
    ends = ranks("train", [{"values": each}])
    assert [end.exitcode for end in ends] == [0, 0], ends[0].output + ends[1].output
    assert read_log(Path(each["output"]) / "log.jsonl")[-1]["skipped"] == 4
    newest = latest_checkpoint(Path(each["output"]))
    assert newest is not None
    state = json.loads((newest / "state.json").read_text())
    listed = (Path(each["output"]) / "bad_samples.jsonl").read_text()
    assert all(f"not-there-{index}.png" in listed for index in (2, 5, 9, 13))
    assert state["skipped"] == len(state["data"]["bad_samples"]["records"]) == 4
    listed = (Path(each["output"]) / "bad_samples.jsonl").read_text().splitlines()
    assert len(listed) == 4, "the rows of both ranks, each once"
