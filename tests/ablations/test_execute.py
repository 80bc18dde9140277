import dataclasses
import errno
import json
import multiprocessing
import os
import random
import signal
import sys
import textwrap
import threading
import time
from functools import partial

import pytest

from vlmamba.ablations.execute import Execution, Outcome, Store, run_node
from vlmamba.ablations.graph import Graph, Node

WORK = """
import json, os, pathlib, signal, sys, time
name, seconds, code, kind = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
here = pathlib.Path({folder!r})
with (here / "starts").open("a") as file:
    file.write(f"{{name}} {{time.time()}}\\n")
state = here / f"{{name}}.steps"
def stop(*_):
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
steps = len(state.read_text().split()) if state.exists() else 0
for step in range(steps, 5):  # a program that goes on where it stood
    time.sleep(seconds / 5)
    with state.open("a") as file:
        file.write(f"{{step}}\\n")
print("last words of", name)
if code: sys.exit(code)
result = here / "store" / kind / (f"{{kind}}-{{name}}" + (".json" if kind == "speed" else ""))
result.mkdir(parents=True, exist_ok=True)
with (here / "ends").open("a") as file:
    file.write(f"{{name}} {{time.time()}}\\n")
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "work.py"
    path.write_text(textwrap.dedent(WORK.format(folder=str(tmp_path))))
    return (sys.executable, "-S", str(path))


def node(name, needs=(), seconds=0.0, code=0, kind="train"):
    return Node(
        f"{kind}-{name}",
        kind,
        name,
        (name, str(seconds), str(code), kind),
        tuple(f"train-{n}" for n in needs),
    )


def graph(*nodes):
    return Graph({n.id: n for n in nodes})


def lines(path):
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def test_everything_runs_once_and_in_order(tmp_path, program):
    work = graph(node("a"), node("b", ["a"]), node("c", ["a"]), node("d", ["b", "c"]))
    store, told = Store(tmp_path / "store"), []
    assert Execution(work, store, jobs=2, program=program, report=told.append).run()
    ends = lines(tmp_path / "ends")
    assert sorted(ends) == ["a", "b", "c", "d"] and ends[0] == "a" and ends[-1] == "d"
    assert told[-1].startswith("finished  [4/4] train-d")
    assert Execution(work, store, program=program).run()
    assert lines(tmp_path / "ends") == ends  # nothing was repeated
    assert store.outcome("train-d").code == 0


def test_a_failed_node_stops_only_those_that_start_from_it(tmp_path, program):
    work = graph(node("a"), node("bad", ["a"], code=3), node("after", ["bad"]), node("other", ["a"]))
    store, told = Store(tmp_path / "store"), []
    execution = Execution(work, store, program=program, report=told.append)
    assert not execution.run()
    assert sorted(lines(tmp_path / "ends")) == ["a", "other"]
    assert [execution.state(n) for n in work.nodes.values()] == ["done", "failed", "blocked", "done"]
    assert store.failure("train-bad").code == 3
    failed = next(line for line in told if line.startswith("FAILED"))
    assert "exit code 3" in failed and "last words of bad" in failed and str(store.log("train-bad")) in failed
    # Mended, it is tried again, and what waited for it runs.
    mended = graph(node("a"), node("bad", ["a"]), node("after", ["bad"]), node("other", ["a"]))
    assert Execution(mended, store, program=program).run()
    assert store.failure("train-bad") is None
    assert lines(tmp_path / "ends").count("a") == 1


def test_measurements_of_speed_run_alone(tmp_path, program):
    nodes = [node(str(i), seconds=0.2) for i in range(4)]
    work = graph(*nodes, node("s1", ["0"], 0.2, kind="speed"), node("s2", ["1"], 0.2, kind="speed"))
    assert Execution(work, Store(tmp_path / "store"), jobs=3, program=program).run()
    starts = {
        name: float(t)
        for name, t in (line.split() for line in (tmp_path / "starts").read_text().splitlines())
    }
    ends = {
        name: float(t) for name, t in (line.split() for line in (tmp_path / "ends").read_text().splitlines())
    }
    for alone in ("s1", "s2"):
        for other in {"0", "1", "2", "3", "s1", "s2"} - {alone}:
            assert ends[other] <= starts[alone] or ends[alone] <= starts[other], (alone, other)
    assert Store(tmp_path / "store").outcome("speed-s1").beside == 0
    assert max(Store(tmp_path / "store").outcome(f"train-{i}").beside for i in range(4)) > 0


def work_through(folder, program):
    """What a call of the command does, in a process that can be killed."""
    nodes = [
        node("a", seconds=0.15),
        *(node(f"b{i}", ["a"], 0.15) for i in range(5)),
        node("z", ["b0"], 0.15),
    ]
    execution = Execution(graph(*nodes), Store(folder / "store"), jobs=2, program=program)
    done = execution.run()
    os._exit(0 if done else 75 if execution.stopped else 1)


def driver(tmp_path, program):
    process = multiprocessing.get_context("fork").Process(target=work_through, args=(tmp_path, program))
    process.start()
    return process


def test_killed_at_random_it_repeats_nothing_that_was_finished(tmp_path, program):
    rng = random.Random(0)
    names = ["a", *(f"b{i}" for i in range(5)), "z"]
    for attempt in range(12):
        process = driver(tmp_path, program)
        process.join(120 if attempt > 7 else rng.uniform(0.05, 1.2))  # the last ones are left alone
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL if attempt % 2 else signal.SIGTERM)
        process.join(30)
        if process.exitcode == 0:
            break
    assert process.exitcode == 0
    for name in names:  # no step of any program was done twice
        assert lines(tmp_path / f"{name}.steps") == ["0", "1", "2", "3", "4"], name
    assert set(lines(tmp_path / "ends")) == set(names)
    done = {p.stem for p in (tmp_path / "store" / "done").iterdir()}
    assert done == {f"train-{n}" for n in names}
    assert all(json.loads(p.read_text())["code"] == 0 for p in (tmp_path / "store" / "done").iterdir())


def test_two_calls_share_the_work(tmp_path, program):
    both = [driver(tmp_path, program) for _ in range(2)]
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    ends = lines(tmp_path / "ends")
    assert len(ends) == len(set(ends)) == 7


def test_asked_to_stop_it_lets_its_programs_save_and_goes_on_later(tmp_path, program):
    work = graph(node("a", seconds=3.0), node("b", ["a"]))
    store = Store(tmp_path / "store")
    execution = Execution(work, store, program=program)
    execution.report = lambda line: (
        os.kill(os.getpid(), signal.SIGTERM) if line.startswith("started") else None
    )
    began = time.monotonic()
    assert not execution.run()
    assert execution.stopped and time.monotonic() - began < 2.5
    assert store.outcome("train-a") is None and store.failure("train-a") is None
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def ignoring(tmp_path):
    """A program that hears no request to stop."""
    path = tmp_path / "deaf.py"
    path.write_text(
        "import pathlib, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"pathlib.Path({str(tmp_path / 'deaf')!r}).touch()\ntime.sleep(60)\n"
    )
    return (sys.executable, "-S", str(path))


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_second_ctrl_c_does_not_wait(tmp_path, number, ends):
    execution = Execution(graph(node("a")), Store(tmp_path / "store"), program=ignoring(tmp_path))

    def press() -> None:
        while not (tmp_path / "deaf").exists():
            time.sleep(0.02)
        for _ in range(2):
            os.kill(os.getpid(), number)
            time.sleep(0.5)
        if not ends:  # a cluster may send a request twice: the program may take its time
            assert execution.running[0].process.poll() is None
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    began = time.monotonic()
    assert not execution.run()
    thread.join()
    assert time.monotonic() - began < 20
    assert execution.stopped and execution.store.failure("train-a") is None


def test_a_stopped_node_of_an_array_says_so(tmp_path, program, monkeypatch):
    work, store = graph(node("a", seconds=3.0), node("b", ["a"])), Store(tmp_path / "store")
    monkeypatch.setattr("vlmamba.ablations.execute.Execution", partial(Execution, program=program))
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert run_node(work, store, "train-a") == 75
    assert run_node(work, store, "train-b") == 1  # what it starts from is not there


def test_a_result_that_was_deleted_is_made_again_where_it_is_needed(tmp_path, program):
    store, told = Store(tmp_path / "store"), []
    work = graph(node("a"), node("b", ["a"]), node("c", ["b"], kind="eval"))
    work.nodes["eval-c"] = dataclasses.replace(work.nodes["eval-c"], needs=("train-b",))
    assert Execution(work, store, program=program).run()
    store.result("train-a").rmdir()  # to make room: nothing wants it any more
    assert Execution(work, store, program=program, report=told.append).run() and told == []
    store.result("train-b").rmdir()
    store.result("eval-c").rmdir()
    assert Execution(work, store, program=program, report=told.append).run()
    assert [line.split()[:2] for line in told if line.startswith("again")] == [
        ["again", "eval-c"], ["again", "train-b"], ["again", "train-a"],
    ]  # fmt: skip
    assert store.result("eval-c").exists()


def test_a_disk_without_locks_is_no_reason_to_wait_for_ever(tmp_path, program, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert Execution(graph(node("a")), Store(tmp_path / "store"), program=program).run()
    assert "cannot be locked" in caplog.text and "No locks available" in caplog.text


def test_what_is_left_is_told_from_what_was_taken(tmp_path, program):
    told = []
    work = graph(*(node(str(i)) for i in range(3)))
    store = Store(tmp_path / "store")
    store.record(Outcome("train-0", "", "", 0, 100.0, 0, None))
    assert not store.result("train-0").exists()
    store.result("train-0").mkdir(parents=True)
    assert Execution(work, store, program=program, report=told.append).run()
    finished = [line for line in told if line.startswith("finished")]
    assert "; about 5" in finished[0] and "left)" in finished[0]  # half of 100 s and next to nothing
    assert "left" not in finished[1]
    assert f"log: {store.log('train-1')}" in told[0]
