"""What the processes of a test do; loaded by path in each of them.

Several runs one after another share one process group, so that a test starts its processes once.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from typing import Any

import torch

from vlmamba.common.processes import Group, spawn
from vlmamba.errors import VLMambaError
from vlmamba.training import faults, loop, saving
from vlmamba.training.config import TrainConfig
from vlmamba.training.run import run

Group.close = lambda self: None  # type: ignore[method-assign]


class Enough(Exception):
    """Ends a run on purpose."""


def several(calls: list[tuple[str, list[dict[str, Any]]]]) -> list[Any]:
    """What several functions of this file return, called one after another in the same processes."""
    return [globals()[name](jobs) for name, jobs in calls]


def train(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs one after another. A job has ``values`` and may have what `_train` takes."""
    logging.basicConfig(level=logging.INFO)
    return [_train(**job) for job in jobs]


def _train(
    values: dict[str, Any],
    *,
    resume: bool = False,
    stop_after: int | None = None,
    hosts: int = 1,
    fault: tuple[str, int, int] | None = None,
) -> dict[str, Any]:
    """One run; what it came to in this process.

    Args:
        resume, values: As for `run`.
        stop_after: Raise after this step.
        hosts: See `pretend`.
        fault: What happens, on which rank, at which step; see `FAULTS`.
    """
    pretend(hosts)
    without_compilation(values)
    seen: dict[str, Any] = {"losses": [], "norms": [], "outcome": "broken off"}
    real_step, real_advance = loop.optimizer_step, loop.advance
    what, rank, at = fault or ("", -1, -1)
    here = int(os.environ.get("RANK", "0")) == rank

    def recorded(training: Any, step: Any) -> tuple[float, float]:
        loss, norm = real_step(training, step)
        seen["losses"].append(loss)
        seen["norms"].append(norm)
        return loss, norm

    def advance(training: Any, *rest: Any) -> None:
        real_advance(training, *rest)
        if what == "stall" and training.state.step == at:
            faults.GRACE_SECONDS = 4.0 if here else 1.0  # the waiting one ends first, undisturbed
            training.alive.__self__.seconds = 3.0
            training.alive()
        if here and training.state.step >= at and what in FAULTS:
            FAULTS[what](training)
        if training.state.step == stop_after:
            raise Enough

    loop.optimizer_step, loop.advance = recorded, advance
    real_inputs = loop.inputs_of
    if here and what == "nan":
        count = 0

        def poisoned(batch: Any, device: torch.device) -> dict[str, torch.Tensor]:
            nonlocal count
            count += 1
            inputs = real_inputs(batch, device)
            if count in (at, at + 1) and "pixel_values" in inputs:
                inputs["pixel_values"] = inputs["pixel_values"] * float("nan")
            return inputs

        loop.inputs_of = poisoned
    try:
        result = run(TrainConfig.from_dict(values), resume=resume)
        seen |= {"outcome": result.outcome, "step": result.step}
    except Enough:
        pass
    except VLMambaError as error:
        seen |= {"outcome": type(error).__name__, "message": str(error)}
    finally:
        loop.optimizer_step, loop.advance, loop.inputs_of = real_step, real_advance, real_inputs
        saving.write_part = REAL_WRITE
    return seen


def _sleep(training: Any) -> None:
    time.sleep(600)


def _full_disk(training: Any) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    saving.write_part = refuse


REAL_WRITE = saving.write_part
FAULTS = {
    "SIGTERM": lambda _: os.kill(os.getpid(), signal.SIGTERM),
    "SIGUSR1": lambda _: os.kill(os.getpid(), signal.SIGUSR1),
    "SIGKILL": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "stall": _sleep,
    "full disk": _full_disk,
}


def without_compilation(values: dict[str, Any]) -> None:
    """Keep DeepSpeed on a CPU from compiling its shared-memory messages first; gloo does."""
    if values["parallel"].startswith("zero"):
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def launch(child: str, what: str) -> None:
    """Our launcher, with two processes that run the code `child` in place of the training."""
    for name in [n for n in os.environ if n.startswith(("SLURM_", "NNODES", "NODE_RANK", "MASTER_"))]:
        del os.environ[name]
    spawn.GRACE_SECONDS = 0.3
    real = subprocess.Popen
    subprocess.Popen = lambda _, **more: real([sys.executable, "-c", child, what], **more)  # type: ignore[assignment, misc]
    sys.exit(spawn.spawn([], 2, verb="train"))


def pretend(hosts: int) -> None:
    """Let the processes look as if they ran on so many hosts."""
    if "WORLD_SIZE" in os.environ:
        local = int(os.environ["WORLD_SIZE"]) // hosts
        os.environ |= {"LOCAL_WORLD_SIZE": str(local), "LOCAL_RANK": str(int(os.environ["RANK"]) % local)}


def gradients(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Loss and whole gradients of the first step of several runs, and which micro-batches had images."""
    return [_gradients(**job) for job in jobs]


def _gradients(values: dict[str, Any], hosts: int = 1) -> dict[str, Any]:
    from torch.distributed.tensor import DTensor

    from vlmamba.training.parts import trainable_parameters

    pretend(hosts)
    without_compilation(values)
    found: dict[str, Any] = {}
    real = loop.optimizer_step

    def caught(training: Any, step: Any) -> tuple[float, float]:
        (supervised,) = training.parallel.sum_counts(step.num_supervised)
        loss = loop.accumulate_gradients(training, step, supervised).sum()
        if hasattr(training.parallel, "engine"):
            found.update(_engine_gradients(training.parallel.names))
        else:
            parameters = trainable_parameters(training.model)
            found["norm"] = training.parallel.clip_grad_norm(parameters.values(), None)
            for name, parameter in parameters.items():
                grad = parameter.grad
                if grad is not None:
                    whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
                    found[name.removeprefix("module.")] = whole.clone()
        found["loss"] = torch.tensor(training.parallel.sum_floats(float(loss)))
        found["images"] = ["pixel_values" in batch for batch in step.micro_batches]
        raise Enough

    loop.optimizer_step = caught
    try:
        run(TrainConfig.from_dict(values))
    except Enough:
        return found
    finally:
        loop.optimizer_step = real
    raise AssertionError("no step was taken")


def _engine_gradients(parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """DeepSpeed's gradients, whole, and their norm."""
    from deepspeed.utils import safe_get_full_grad

    found = {name: safe_get_full_grad(p).clone() for name, p in parameters.items()}
    return {**found, "norm": torch.stack([g.norm() for g in found.values()]).norm()}
