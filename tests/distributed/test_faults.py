"""What ends a run of several processes early: each fault in one of them, and what all of them make of it."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmamba.training.checkpoint import latest_step
from vlmamba.training.faults import EXIT_STALLED

Values = Callable[..., dict[str, Any]]


def job(values: dict[str, Any], fault: tuple[str, int, int] | None = None, **more: Any) -> dict[str, Any]:
    return {"values": values, "fault": fault, **more}


@pytest.mark.ci
def test_faults_that_all_processes_learn_of(values: Values, ranks: Any, tmp_path: Path) -> None:
    common = {"parallel": "fsdp2", "save_every": 2, "epochs": 2}
    stopped = values(common, output="stopped")
    full = values(common, output="full")
    full_async = values({**common, "save_async": True}, output="full-async")
    skipping = values({**common, "max_nonfinite_steps": 2}, output="skipping")
    giving_up = values({**common, "max_nonfinite_steps": 1, "parallel": "ddp"}, output="giving-up")
    (tmp_path / "file").write_text("")
    unwritable = {**values(common), "output": str(tmp_path / "file" / "run")}
    jobs = [
        job(stopped, ("SIGUSR1", 1, 3)),
        job(stopped, ("SIGTERM", 0, 5), resume=True),
        job(full, ("full disk", 1, 3)),
        job(full_async, ("full disk", 1, 3)),
        job(skipping, ("nan", 1, 3)),
        job(giving_up, ("nan", 1, 3)),
        job(unwritable),
    ]
    ends = ranks("train", jobs)
    assert [end.exitcode for end in ends] == [0, 0], ends[0].output + ends[1].output
    first, second = (end.value for end in ends)

    # A signal to one process: all save the same step and stop.
    for results in (first, second):
        assert (results[0]["outcome"], results[0]["step"]) == ("stopped", 3)
        assert (results[1]["outcome"], results[1]["step"]) == ("stopped", 5)
    assert latest_step(Path(stopped["output"])) == 5

    # A full disk on one process's side: the same error in all, the earlier checkpoint stays, nothing is left over.
    for index, config in ((2, full), (3, full_async)):
        for results in (first, second):
            assert results[index]["outcome"] == "WriteError"
            assert "No space left on device" in results[index]["message"]
            assert "What was there before is unharmed" in results[index]["message"]
        assert latest_step(Path(config["output"])) == 2
        folder = Path(config["output"]) / "checkpoints"
        assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-000002"]

    # A loss that is not finite on one rank: no rank takes the step, and its samples are written down.
    assert first[4]["outcome"] == second[4]["outcome"] == "finished"
    entries = [
        json.loads(line) for line in (Path(skipping["output"]) / "nonfinite.jsonl").read_text().splitlines()
    ]
    assert 1 <= len(entries) <= 2
    assert len(entries[0]["samples"]) == 4
    assert {s["rank"] for s in entries[0]["samples"] if not s["finite"]} == {1}
    assert sum(loss != loss for loss in first[4]["losses"]) == len(entries)
    log = [json.loads(line) for line in (Path(skipping["output"]) / "log.jsonl").read_text().splitlines()]
    assert log[-1]["nonfinite"] == len(entries) and log[-1]["loss"] < log[0]["loss"]
    if len(entries) == 2:
        assert first[5]["outcome"] == second[5]["outcome"] == "TrainingError"
        assert "2 such steps in a row are more than max_nonfinite_steps 1" in second[5]["message"]

    # A folder that cannot be written: said by the first process, the others say so.
    assert first[6]["outcome"] == "CheckpointError" and "cannot be written" in first[6]["message"]
    assert second[6]["outcome"] == "CheckpointError"
    assert second[6]["message"].startswith("stopped, because rank 0 reported: the run's folder")


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.ci), "fsdp2"])
def test_a_killed_process_ends_the_others(values: Values, ranks: Any, parallel: str) -> None:
    began = time.monotonic()
    ends = ranks("train", [job(values({"parallel": parallel, "save_every": 1}), ("SIGKILL", 1, 2))])
    assert ends[1].exitcode == -signal.SIGKILL
    assert ends[0].exitcode == 1
    assert "Traceback" in ends[0].output and "vlmamba/training/loop.py" in ends[0].output
    assert "onnection closed by peer" in ends[0].output or "onnection reset by peer" in ends[0].output
    assert time.monotonic() - began < 200  # it does not wait for a limit
    assert latest_step(Path(values()["output"])) in (1, 2)


@pytest.mark.ci
def test_a_hang_is_written_down_by_every_process(values: Values, ranks: Any) -> None:
    config = values({"parallel": "ddp", "stall_seconds": 200.0})
    ends = ranks("train", [job(config, ("stall", 1, 2))])
    assert [end.exitcode for end in ends] == [EXIT_STALLED] * 2, ends[0].output + ends[1].output
    waiting, hung = ((Path(config["output"]) / f"stall-rank-0000{rank}.txt").read_text() for rank in (0, 1))
    assert "rank 1: nothing moved for 3 s (stall_seconds). Stacks of all threads:" in hung
    assert "_sleep" in hung and "all_reduce" in waiting
    assert "nothing moved for 3 s" in ends[0].output
