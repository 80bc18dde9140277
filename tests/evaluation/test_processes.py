"""Several processes share the questions; a killed evaluation loses and repeats nothing."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest

from vlmamba.cli import evaluate
from vlmamba.common.processes import spawn
from vlmamba.errors import ConfigError, DataError
from vlmamba.evaluation.records import lock_answers, part_path, part_paths, read_records, record_key
from vlmamba.testing import tiny_model
from vlmamba.testing.processes import run_ranks, start_ranks, wait_for

PROGRAMS = Path(__file__).with_name("programs.py")
TASK = str(Path(__file__).parents[2] / "eval/playground.py")


def measure(questions, output, folder, *, world_size=1, batch_size=3, pause=0.0):
    ends = run_ranks(
        PROGRAMS,
        "measure",
        TASK,
        str(questions),
        str(output),
        batch_size,
        pause,
        world_size=world_size,
        folder=folder,
    )
    assert [end.exitcode for end in ends] == [0] * world_size, "\n".join(end.output for end in ends)
    return [end.value for end in ends]


def test_two_processes_answer_as_one_does(heldout, tmp_path):
    (alone,) = measure(heldout, tmp_path / "one/a.jsonl", tmp_path / "1")
    both = measure(heldout, tmp_path / "two/a.jsonl", tmp_path / "2", world_size=2)
    assert both[0] == {**both[1], "seconds": both[0]["seconds"]}  # every process knows the whole result
    assert both[0]["metrics"] == alone["metrics"]
    assert (both[0]["counts"], both[0]["settings"]["processes"]) == (alone["counts"], 2)
    assert (tmp_path / "one/a.jsonl").read_bytes() == (tmp_path / "two/a.jsonl").read_bytes()
    assert part_paths(tmp_path / "two/a.jsonl") == []
    asked = (tmp_path / "two/a.asked").read_text().split()
    assert sorted(asked, key=int) == [str(i) for i in range(10)]  # every question once


def test_the_command_line_under_a_launcher(heldout, tmp_path):
    model, processor = tiny_model()
    model.save_pretrained(tmp_path / "run")
    processor.save_pretrained(tmp_path / "run")
    words = [
        "eval",
        str(tmp_path / "run"),
        "--tasks",
        TASK,
        "--option",
        f"annotations={heldout}",
        "--shuffle",
    ]
    ends = run_ranks(PROGRAMS, "command", words, world_size=2, folder=tmp_path / "out")
    assert [end.exitcode for end in ends] == [0, 0], ends[0].output + ends[1].output
    results = json.loads((tmp_path / "run/eval/results.json").read_text())
    result = results["tasks"]["playground"]
    assert result["counts"]["answered"] == result["shuffled"]["counts"]["answered"] == 10
    assert "asked 10, answered 10, missing 0" in ends[0].output
    assert f"data {result['settings']['data']}" in ends[0].output
    assert "asked" not in ends[1].output


def test_the_command_starts_processes_itself(monkeypatch):
    started = []
    monkeypatch.setattr(
        spawn, "spawn", lambda words, count, *, verb: started.append((words, count, verb)) or 0
    )
    words = ["run", "--tasks", "pope", "--nproc", "3", "--limit", "5"]
    assert evaluate.run(words) == 0
    assert evaluate.run(["run", "--tasks", "pope", "--nproc=2"]) == 0
    assert started == [
        (["run", "--tasks", "pope", "--limit", "5"], 3, "eval"),
        (["run", "--tasks", "pope"], 2, "eval"),
    ]
    with pytest.raises(ConfigError, match="--nproc: a number of processes or auto, got '0'"):
        evaluate.run(["run", "--tasks", "pope", "--nproc", "0"])


def test_an_error_of_the_first_process_ends_all(heldout, tmp_path):
    output = tmp_path / "a.jsonl"
    output.write_text('{"question_id": 0, "text": "x", "prompt": "of another run"}\n')
    ends = run_ranks(
        PROGRAMS, "measure", TASK, str(heldout), str(output), 3, 0.0, world_size=2, folder=tmp_path / "2"
    )
    assert [end.exitcode for end in ends] == [1, 1]
    for end in ends:
        assert "holds 1 answer(s) given by another model, data or settings" in end.output


def test_two_evaluations_of_one_file_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    with (
        lock_answers(path),
        pytest.raises(DataError, match=r"the answer file .*a\.jsonl is in use by process"),
        lock_answers(path),
    ):
        pass
    with lock_answers(path):
        pass


def killed_runs(heldout, tmp_path, *, kills, seed):
    """Kill an evaluation at random points, in turn of one and of two processes, until it has been killed so often."""
    rows = heldout.read_text().splitlines()
    many = [json.dumps({**json.loads(rows[i % 10]), "question_id": i}) for i in range(60)]
    heldout.write_text("\n".join(many) + "\n")
    pause = 0.05
    measure(heldout, tmp_path / "whole/a.jsonl", tmp_path / "whole")
    output, rng = tmp_path / "killed/a.jsonl", random.Random(seed)
    output.parent.mkdir()
    asked_log = output.with_suffix(".asked")
    for life in range(kills):
        before = recorded(output)
        asked_log.unlink(missing_ok=True)
        folder = tmp_path / f"life{life}"
        arguments = (TASK, str(heldout), str(output), 2, pause)
        world_size = 1 + life % 2
        processes = start_ranks(PROGRAMS, "measure", *arguments, world_size=world_size, folder=folder)
        target, begun = rng.randint(2, 2 * 60 // kills), time.monotonic()
        while asked_count(asked_log) < target and time.monotonic() - begun < 60 and processes[0].is_alive():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 2 * pause))
        for process in processes:
            process.kill()
        ends = wait_for(processes, folder, seconds=10)
        assert {end.exitcode for end in ends} <= {-signal.SIGKILL, 0}, ends[0].output
        after = recorded(output)
        assert before.items() <= after.items()  # nothing is lost
        asked = asked_log.read_text().split() if asked_log.exists() else []
        assert len(set(asked)) == len(asked)
        assert not set(asked) & {key[0] for key in before}, "asked although the answer was there"
    asked_log.unlink(missing_ok=True)
    before = recorded(output)
    (result,) = measure(heldout, output, tmp_path / "last")
    assert result["counts"]["resumed"] == len(before)
    assert result["counts"]["answered"] == 60
    assert output.read_bytes() == (tmp_path / "whole/a.jsonl").read_bytes()
    return len(before)


def asked_count(log):
    return log.read_text().count("\n") if log.exists() else 0


def recorded(output):
    files = [file for file in [output, part_path(output, 0), part_path(output, 1)] if file.exists()]
    return {record_key(r): r["text"] for file in files for r in read_records(file)}


@pytest.mark.ci
def test_a_killed_evaluation_goes_on(heldout, tmp_path):
    assert killed_runs(heldout, tmp_path, kills=2, seed=0) > 5


@pytest.mark.slow
def test_twenty_kills(heldout, tmp_path):
    assert killed_runs(heldout, tmp_path, kills=20, seed=1) > 20
