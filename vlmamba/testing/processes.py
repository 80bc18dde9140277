"""Several processes that work together, started in a blink: forked from a server that has imported torch once."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmamba.common.processes import Launch
from vlmamba.common.processes.spawn import free_port

PRELOADED = ["torch", "vlmamba.training.run", "vlmamba.testing"]


@dataclass(frozen=True)
class Ended:
    """How one process ended.

    Attributes:
        exitcode: As `multiprocessing.Process.exitcode`: negative for a signal, None if it had to be killed.
        value: What the function returned, if it did.
        output: Its stdout and stderr.
    """

    exitcode: int | None
    value: Any
    output: str


def run_ranks(
    program: Path, function: str, *arguments: Any, world_size: int = 2, folder: Path, **how: Any
) -> list[Ended]:
    """Call a function in several processes, as `start_ranks` does, and wait for them."""
    processes = start_ranks(program, function, *arguments, world_size=world_size, folder=folder, **how)
    return wait_for(processes, folder, seconds=how.get("seconds", 120.0))


def start_ranks(
    program: Path,
    function: str,
    *arguments: Any,
    world_size: int,
    folder: Path,
    environment: dict[str, str] | None = None,
    seconds: float = 120.0,
) -> list[Any]:
    """Call a function in several processes that know of each other as torchrun's do.

    Args:
        program: A Python file, loaded by path in every process.
        function: Its function; called with the arguments, which must be picklable.
        world_size: How many processes; 1 is one without launcher variables.
        folder: For outputs and results.
        environment: Further variables.
        seconds: After which what still runs writes down its stacks and is ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = []
    for rank in range(world_size):
        place = Launch(rank, world_size, rank, world_size, master_port=port)
        variables = {**(place.variables() if world_size > 1 else {}), **(environment or {})}
        process = context.Process(
            target=_rank, args=(program, function, arguments, variables, folder / str(rank), seconds)
        )
        process.start()
        processes.append(process)
    return processes


def wait_for(processes: Sequence[Any], folder: Path, *, seconds: float = 120.0) -> list[Ended]:
    """The ends of started processes; what runs longer is killed."""
    import torch

    limit = time.monotonic() + seconds + 5.0
    ends = []
    for rank, process in enumerate(processes):
        process.join(max(0.1, limit - time.monotonic()))
        code = process.exitcode
        if process.is_alive():
            process.kill()
            process.join()
        result = folder / f"{rank}.result"
        value = torch.load(result, weights_only=True) if result.is_file() else None
        output = folder / f"{rank}.output"
        ends.append(
            Ended(
                code, value, output.read_text(encoding="utf-8", errors="replace") if output.is_file() else ""
            )
        )
    return ends


def _dump_after(seconds: float) -> None:
    """Should the function hang, say where; a watch of its own may use faulthandler's only timer meanwhile."""

    def dump() -> None:
        time.sleep(seconds)
        faulthandler.dump_traceback(2)
        os._exit(124)

    threading.Thread(target=dump, daemon=True).start()


def _rank(
    program: Path,
    function: str,
    arguments: Sequence[Any],
    variables: dict[str, str],
    stem: Path,
    seconds: float,
) -> None:
    import torch

    with stem.with_suffix(".output").open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    _dump_after(seconds)
    os.environ.update(variables)
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location(program.stem, program)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[program.stem] = module
    spec.loader.exec_module(module)
    code = 0
    try:
        value = getattr(module, function)(*arguments)
        torch.save(value, stem.with_suffix(".part"))
        stem.with_suffix(".part").rename(stem.with_suffix(".result"))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - what it was is written down, and the process ends
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
