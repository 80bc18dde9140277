"""Starting the processes of a run on this host: ``vlmamba train RECIPE --nproc 8``."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from vlmamba.common.processes.launch import DEFAULT_PORT, Launch, first_host, int_variable, read_launch
from vlmamba.errors import ConfigError

EXIT_STOPPED = 75
"""Stopped on request after saving: start the same command again with --resume (EX_TEMPFAIL of sysexits.h)."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE_SECONDS = 10.0
"""What the other processes have to report and end themselves after one has failed."""


def spawn_asked(words: Sequence[str], nproc: str, *, verb: str) -> int | None:
    """Start the processes that ``--nproc`` asks for, unless a launcher has started this one.

    Args:
        words: Those of the command line, with ``--nproc`` or without.
        nproc: Its value: a number, or "auto": one a GPU, one where there is none.
        verb: Of the command.

    Returns:
        The exit code of `spawn`, or None: this process is to do the work itself.

    Raises:
        ConfigError: The value is neither.
    """
    if nproc != "auto" and (not nproc.isdecimal() or int(nproc) < 1):
        raise ConfigError(f"--nproc: a number of processes or auto, got {nproc!r}")
    if read_launch().launcher != "none":
        return None
    if nproc == "auto":
        import torch

        nproc = str(max(1, torch.cuda.device_count()))
    if nproc == "1" and "NNODES" not in os.environ:
        return None
    kept = [
        word
        for word, before in zip(words, ("", *words), strict=False)
        if word != "--nproc" and not word.startswith("--nproc=") and before != "--nproc"
    ]
    return spawn(kept, int(nproc), verb=verb)


def spawn(words: Sequence[str], count: int, *, verb: str) -> int:
    """Run ``vlmamba VERB WORDS`` in several processes on this host until all have ended.

    What torchrun does, without its agent: a request to stop reaches every process and is given the time to save, and
    the exit code says whether to start again.

    Returns:
        0; or the exit code of the first process that failed, after which the others are ended; or `EXIT_STOPPED`.
    """
    command = [sys.executable, "-m", "vlmamba", verb, *words]
    children: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    previous = {each: signal.signal(each, forward) for each in STOP_SIGNALS}
    threads = max(1, (os.cpu_count() or 1) // count)
    try:
        for place in launches(count):
            environment = {"OMP_NUM_THREADS": str(threads), **os.environ, **place.variables()}
            children.append(
                subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=end_with_parent)
            )
        return _wait(children)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for each, handler in previous.items():
            signal.signal(each, handler)


def launches(count: int, environ: Mapping[str, str] | None = None) -> list[Launch]:
    """The places of the processes of this host.

    Hosts know of each other by NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT, or by srun's variables when it starts
    one task a host.

    Args:
        count: How many.
        environ: Variables that say which host of how many this is.

    Raises:
        ConfigError: They contradict each other.
    """
    environ = os.environ if environ is None else environ
    hosts, host = int_variable(environ, "NNODES", 1), int_variable(environ, "NODE_RANK", 0)
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if "NNODES" not in environ and int_variable(environ, "SLURM_STEP_NUM_TASKS", 1) > 1:
        task = read_launch({k: v for k, v in environ.items() if k.startswith(("SLURM_", "MASTER_"))})
        hosts, host = task.world_size, task.rank
        address = address or first_host(environ["SLURM_STEP_NODELIST"])
        port = port or str(task.master_port)
    if hosts > 1 and address is None:
        raise ConfigError(f"NNODES is {hosts}, but MASTER_ADDR does not say where host 0 is reached.")
    if not 0 <= host < hosts:
        raise ConfigError(f"NODE_RANK is {host}, but it goes from 0 to NNODES - 1, which is {hosts - 1}.")
    chosen = int(port) if port else (DEFAULT_PORT if hosts > 1 else free_port())
    return [
        Launch(
            rank=host * count + index,
            world_size=hosts * count,
            local_rank=index,
            local_world_size=count,
            master_addr=address or "127.0.0.1",
            master_port=chosen,
        )
        for index in range(count)
    ]


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    failed_at: float | None = None
    code = 0
    while None in [child.poll() for child in children]:
        if failed_at is None:
            failures = [c for c in children if c.returncode not in (None, 0, EXIT_STOPPED)]
            if failures:
                failed_at, code = time.monotonic(), failures[0].returncode
                sys.stderr.write(
                    f"process {children.index(failures[0])} of this host ended with {_words(code)}; ending the others\n"
                )
        elif time.monotonic() - failed_at > GRACE_SECONDS:
            for child in children:
                if child.poll() is None:
                    child.kill()
        time.sleep(0.05)
    codes = [child.returncode for child in children]
    failures_left = [c for c in codes if c not in (0, EXIT_STOPPED)]
    code = code or (failures_left[0] if failures_left else max(codes))
    return code if code >= 0 else 128 - code


def _words(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def end_with_parent() -> None:
    """For `preexec_fn`: should the parent be killed, Linux kills this process too (prctl PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def free_port() -> int:
    """A port of this host that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
