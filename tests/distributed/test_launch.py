"""Launchers: whose variables are read, and what our own one starts and returns."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from vlmamba.common.processes import Launch, read_launch, spawn
from vlmamba.common.processes.launch import first_host, tasks_per_node
from vlmamba.errors import ConfigError
from vlmamba.testing.processes import Ended, start_ranks, wait_for

PROGRAMS = Path(__file__).with_name("programs.py")
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "gpu01",
    "MASTER_PORT": "1234",
}
SLURM = {
    "SLURM_JOB_ID": "41234",
    "SLURM_STEP_NUM_TASKS": "9",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),1",
    "SLURM_STEP_NODELIST": "gpu[003-004,9]",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
}


def test_variables_of_launchers() -> None:
    assert read_launch({}) == Launch()
    assert read_launch(TORCHRUN) == Launch(5, 8, 1, 4, "gpu01", 1234, "torchrun")
    assert read_launch(SLURM) == Launch(6, 9, 2, 4, "gpu003", 20000 + 41234 % 20000, "slurm")
    assert read_launch(TORCHRUN | SLURM).launcher == "torchrun"
    # deepspeed and accelerate launch do not always set LOCAL_WORLD_SIZE.
    short = {k: v for k, v in TORCHRUN.items() if k != "LOCAL_WORLD_SIZE"}
    assert read_launch(short | {"LOCAL_SIZE": "4"}).local_world_size == 4
    # A batch script or an interactive shell of a job with many tasks is one process.
    assert read_launch({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}) == Launch()
    with pytest.raises(ConfigError, match="the environment variable RANK is None, not a number"):
        read_launch({"WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match=r"contradict each other: rank 8 of 8"):
        read_launch(TORCHRUN | {"RANK": "8"})


def test_slurm_lists() -> None:
    assert [first_host(x) for x in ("a1", "a1,b2", "gpu[07-09,12]", "n[3]-ib,m1")] == [
        "a1",
        "a1",
        "gpu07",
        "n3-ib",
    ]
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(ConfigError, match=r"is not of the form 4\(x2\),1"):
        tasks_per_node("four")


def test_places_on_several_hosts() -> None:
    places = spawn.launches(2, {"NNODES": "3", "NODE_RANK": "1", "MASTER_ADDR": "gpu01"})
    assert places == [
        Launch(2, 6, 0, 2, "gpu01", 29500),
        Launch(3, 6, 1, 2, "gpu01", 29500),
    ]
    task = SLURM | {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "1(x3)", "SLURM_PROCID": "2"}
    task |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "2"}
    assert [p.rank for p in spawn.launches(4, task)] == [8, 9, 10, 11]
    assert spawn.launches(4, task)[0].master_addr == "gpu003"
    with pytest.raises(ConfigError, match="NNODES is 2, but MASTER_ADDR does not say"):
        spawn.launches(1, {"NNODES": "2"})
    with pytest.raises(ConfigError, match="NODE_RANK is 2, but it goes from 0 to NNODES - 1, which is 1"):
        spawn.launches(1, {"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "x"})


# Stands for the training: acts by rank, without importing anything heavy.
CHILD = """
import os, signal, sys, time
rank, what = int(os.environ["RANK"]), sys.argv[1]
if what == "variables":
    print(rank, os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"], os.environ["MASTER_PORT"], flush=True)
elif what == "stop":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    print("ready", flush=True)
    time.sleep(60)
elif what == "die":
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
"""


class Started:
    """Our launcher with that child, forked from a server that has imported torch once."""

    def __init__(self, what: str, folder: Path) -> None:
        self.folder = folder / what
        self.processes = start_ranks(PROGRAMS, "launch", CHILD, what, world_size=1, folder=self.folder)

    def output(self) -> str:
        """What it has written so far."""
        path = self.folder / "0.output"
        return path.read_text() if path.is_file() else ""

    def send(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.processes[0].pid, number)

    def end(self) -> Ended:
        """Wait for it."""
        (ended,) = wait_for(self.processes, self.folder)
        return ended


def test_spawned_processes_know_their_places(tmp_path: Path) -> None:
    ended = Started("variables", tmp_path).end()
    assert ended.exitcode == 0, ended.output
    lines = sorted(line.split() for line in ended.output.splitlines())
    assert [line[:3] for line in lines] == [["0", "2", "0"], ["1", "2", "1"]]
    assert lines[0][3] == lines[1][3]


def test_a_request_to_stop_reaches_all_and_its_code_comes_back(tmp_path: Path) -> None:
    started = Started("stop", tmp_path)
    limit = time.monotonic() + 55
    while started.output().count("ready\n") < 2 and time.monotonic() < limit:
        time.sleep(0.05)
    started.send(signal.SIGUSR1)
    assert started.end().exitcode == 75


def test_one_that_dies_ends_the_others(tmp_path: Path) -> None:
    began = time.monotonic()
    ended = Started("die", tmp_path).end()
    assert ended.exitcode == 128 + signal.SIGKILL
    assert "process 1 of this host ended with SIGKILL; ending the others" in ended.output
    assert time.monotonic() - began < 55
