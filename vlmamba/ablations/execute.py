"""Running the nodes of a graph: one after another or several at a time, each in a process of its own.

Whatever happens, what is finished stays finished. A node that has ended well leaves a file in ``done/`` and is not run
again; one that failed leaves its reason in ``failed/`` and its output in ``logs/``, holds up only those that start from
it, and is tried again by the next call. A lock on each node, inherited by its process, keeps two calls (or the nodes of
a cluster) from running the same one.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal

from vlmamba.ablations.graph import Graph, Node, write_nodes
from vlmamba.common.files import replace_text
from vlmamba.common.processes import EXIT_STOPPED, STOP_SIGNALS, end_with_parent
from vlmamba.evaluation.tables import duration
from vlmamba.registry import PLUGINS, admit, plugins
from vlmamba.training.run_dir import git_commit

logger = logging.getLogger(__name__)

State = Literal["done", "failed", "blocked", "waiting", "running"]
POLL_SECONDS = 0.2
LOG_TAIL = 12
"""Lines of a failed node's output that are shown."""


@dataclass(frozen=True)
class Outcome:
    """How a node ended.

    Attributes:
        seconds: Of its process; of the last one, where it was stopped and went on.
        code: Exit code.
        beside: Other nodes that ran at the same time, at most.
        commit: Of the code when it was started.
    """

    id: str
    label: str
    command: str
    code: int
    seconds: float
    beside: int
    commit: str | None


class Store:
    """A folder of results.

    Args:
        root: The folder: nodes/, train/, eval/, speed/, logs/, done/, failed/, locks/.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def outcome(self, node_id: str) -> Outcome | None:
        """How a finished node ended, None if it has not."""
        return self._read("done", node_id)

    def failure(self, node_id: str) -> Outcome | None:
        """How a failed node ended."""
        return self._read("failed", node_id)

    def log(self, node_id: str) -> Path:
        """Its output."""
        return self.root / "logs" / f"{node_id}.log"

    def result(self, node_id: str) -> Path:
        """The folder of its result (a file with suffix .json of a speed node)."""
        kind = node_id.partition("-")[0]
        return self.root / kind / (f"{node_id}.json" if kind == "speed" else node_id)

    def record(self, outcome: Outcome) -> None:
        """Write down how a node ended."""
        name = f"{outcome.id}.json"
        kind, other = ("failed", "done") if outcome.code else ("done", "failed")
        (self.root / kind).mkdir(parents=True, exist_ok=True)
        replace_text(self.root / kind / name, json.dumps(asdict(outcome), indent=1) + "\n")
        (self.root / other / name).unlink(missing_ok=True)

    def forget(self, node_id: str) -> None:
        """Have a node run again."""
        (self.root / "done" / f"{node_id}.json").unlink(missing_ok=True)

    def lock(self, node_id: str) -> int | None:
        """Take a node's lock: a descriptor that holds it, None where another process does."""
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / node_id, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): do not start a second call beside this one", folder, error
            )
        return descriptor

    def _read(self, kind: str, node_id: str) -> Outcome | None:
        file = self.root / kind / f"{node_id}.json"
        if not file.is_file():
            return None
        return Outcome(**json.loads(file.read_text(encoding="utf-8")))


@dataclass
class _Running:
    node: Node
    process: subprocess.Popen[bytes]
    lock: int
    started: float
    beside: int
    commit: str | None
    asked_to_end: bool = False


@dataclass
class Execution:
    """A call that runs a graph.

    Attributes:
        jobs: Nodes at a time.
        nproc: Processes of each training and evaluation (``vlmamba train --nproc``).
        report: Told of every change, for a progress display.
        program: What a node's words are given to.
    """

    graph: Graph
    store: Store
    jobs: int = 1
    nproc: str = "1"
    report: Callable[[str], None] = logger.info
    program: tuple[str, ...] = (sys.executable, "-m", "vlmamba")
    running: list[_Running] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    stopped: bool = False
    hurried: bool = False

    def run(self) -> bool:
        """Run everything that can be run; True if nothing is left."""
        write_nodes(self.graph, self.store.root)
        needed = {need for node in self.graph.nodes.values() for need in node.needs}
        self._again_if_gone([name for name in self.graph.nodes if name not in needed])
        previous = {each: signal.signal(each, self._stop) for each in STOP_SIGNALS}
        try:
            while self._turn():
                time.sleep(POLL_SECONDS)
        finally:
            for each in self.running:
                each.process.kill()
                each.process.wait()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return all(self.state(node) == "done" for node in self.graph.nodes.values())

    def state(self, node: Node) -> State:
        """Where a node stands."""
        if self._done(node.id):
            return "done"
        if any(r.node.id == node.id for r in self.running):
            return "running"
        if node.id in self.failed:
            return "failed"
        if any(self.state(self.graph.nodes[n]) in ("failed", "blocked") for n in node.needs):
            return "blocked"
        return "waiting"

    def _turn(self) -> bool:
        """Collect what has ended, start what can start; False when there is nothing left to wait for."""
        self._collect()
        waiting = [n for n in self.graph.nodes.values() if self.state(n) == "waiting"]
        if self.stopped:
            self._end_all()
            return bool(self.running)
        ready = [n for n in waiting if all(self._done(need) for need in n.needs)]
        for node in (n for n in ready if not n.exclusive):
            if len(self.running) < self.jobs and not any(r.node.exclusive for r in self.running):
                self._start(node)
        alone = [n for n in ready if n.exclusive]
        if alone and not self.running and all(n.exclusive or n not in ready for n in waiting):
            self._start(alone[0])
        return bool(self.running or waiting)

    def _start(self, node: Node) -> None:
        if self._again_if_gone(node.needs):
            return
        lock = self.store.lock(node.id)
        if lock is None:  # another call is at it: its result is waited for
            return
        if self.store.outcome(node.id) is not None:
            os.close(lock)
            return
        for folder in ("logs", *{n.partition("-")[0] for n in self.graph.nodes}):
            (self.store.root / folder).mkdir(parents=True, exist_ok=True)
        command = [*self.program, *node.words]
        if node.kind != "speed" and self.nproc != "1":
            command += ["--nproc", self.nproc]
        for name in node.config.code() if node.config is not None else ():
            admit(name)  # as the person did whose table it is
        environment = {"VLMAMBA_PROGRESS": "0", **os.environ, PLUGINS: ",".join(plugins())}
        if self.jobs > 1 and not node.exclusive:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.jobs)))
        with self.store.log(node.id).open("ab") as log:
            log.write(f"\n== {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, pass_fds=(lock,),
                start_new_session=True, preexec_fn=end_with_parent,
            )  # fmt: skip
        self.running.append(
            _Running(node, process, lock, time.perf_counter(), len(self.running), git_commit())
        )
        for each in self.running:
            each.beside = max(each.beside, len(self.running) - 1)
        self.report(f"started   {self._place()} {node.id}  {node.label}; log: {self.store.log(node.id)}")

    def _collect(self) -> None:
        for each in [r for r in self.running if r.process.poll() is not None]:
            self.running.remove(each)
            code, seconds = int(each.process.returncode), time.perf_counter() - each.started
            if code != EXIT_STOPPED and not (self.stopped and code):
                outcome = Outcome(
                    each.node.id, each.node.label, " ".join(("vlmamba", *each.node.words)), code,
                    round(seconds, 2), each.beside, each.commit,
                )  # fmt: skip
                self.store.record(outcome)
                if code:
                    self.failed.add(each.node.id)
            os.close(each.lock)
            self._tell(each.node, code, seconds)

    def _tell(self, node: Node, code: int, seconds: float) -> None:
        if not code:
            self.report(
                f"finished  {self._place()} {node.id}  {node.label} ({duration(seconds)}{self._left()})"
            )
        elif code == EXIT_STOPPED or self.stopped:
            self.report(f"stopped   {node.id}  {node.label}; it goes on where it stands")
        else:
            tail = (
                self.store.log(node.id).read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL:]
            )
            lines = "\n".join(f"    {line}" for line in tail)
            self.report(
                f"FAILED    {node.id}  {node.label}: exit code {code}; {self.store.log(node.id)}:\n{lines}"
            )

    def _place(self) -> str:
        return f"[{sum(self._done(n) for n in self.graph.nodes)}/{len(self.graph.nodes)}]"

    def _left(self) -> str:
        """How long the rest takes, if nodes take what those of their kind have taken."""
        taken: dict[str, list[float]] = {}
        for node in self.graph.nodes.values():
            outcome = self.store.outcome(node.id) if node.id in self.done else None
            if outcome is not None:
                taken.setdefault(node.kind, []).append(outcome.seconds)
        rest = [taken.get(n.kind, [0.0]) for n in self.graph.nodes.values() if n.id not in self.done]
        seconds = sum(sum(each) / len(each) for each in rest) / self.jobs
        return f"; about {duration(seconds)} left" if seconds else ""

    def _done(self, node_id: str) -> bool:
        """Whether a node has finished, which it does once."""
        if node_id not in self.done and self.store.outcome(node_id) is not None:
            self.done.add(node_id)
        return node_id in self.done

    def _again_if_gone(self, names: Iterable[str]) -> bool:
        """Have finished nodes run again whose results were deleted and are wanted."""
        gone = [n for n in names if self._done(n) and not self.store.result(n).exists()]
        for name in gone:
            self.store.forget(name)
            self.done.discard(name)
            self.report(
                f"again     {name}  {self.graph.nodes[name].label}: {self.store.result(name)} is gone"
            )
        return bool(gone)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        # A second Ctrl-C only: a cluster may send a request twice.
        self.hurried = self.stopped and number == signal.SIGINT
        self.stopped = True

    def _end_all(self) -> None:
        """Ask what runs to save and end; end it at once when people do not want to wait."""
        for each in self.running:
            if self.hurried:
                each.process.kill()
            elif not each.asked_to_end:
                each.process.terminate()
                each.asked_to_end = True
                self.report(
                    f"stopping  {each.node.id}  {each.node.label}; Ctrl-C again: at once, without saving"
                )


def run_node(graph: Graph, store: Store, node_id: str, *, nproc: str = "1") -> int:
    """Run one node of a graph (a task of a cluster's array) after those it needs; returns an exit code.

    Nodes that it needs must have finished: the array of an earlier wave has seen to that. Exit code 75: it was asked
    to stop, and goes on when started again.
    """
    node = graph.nodes[node_id]
    missing = [n for n in node.needs if store.outcome(n) is None or not store.result(n).exists()]
    if missing:
        logger.error(
            "%s (%s) starts from %s, which has not finished, or whose result is gone",
            node_id,
            node.label,
            ", ".join(missing),
        )
        return 1
    one = Graph({node_id: Node(node.id, node.kind, node.label, node.words, (), node.config)})
    execution = Execution(one, store, nproc=nproc)
    if execution.run():
        return 0
    return EXIT_STOPPED if execution.stopped else 1
