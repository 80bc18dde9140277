"""Who started this process, and which of how many it is. The one place that reads a launcher's variables.

torchrun, ``accelerate launch`` and ``deepspeed`` set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
MASTER_PORT. SLURM's srun sets its own (``man srun``, output environment variables); those of the step count, not those
of the job, so that a batch script or an interactive shell is one process.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmamba.errors import ConfigError

if TYPE_CHECKING:
    import torch

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Launch:
    """The place of this process among all of a run.

    Attributes:
        rank, world_size: Over all hosts.
        local_rank, local_world_size: On this host.
        master_addr, master_port: Where rank 0 listens.
        launcher: What set the variables: "none", "torchrun" (or whatever sets its variables) or "slurm".
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = DEFAULT_PORT
    launcher: str = "none"

    @property
    def num_hosts(self) -> int:
        """Hosts, each with as many processes."""
        return self.world_size // self.local_world_size

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size or not 0 <= self.local_rank < self.local_world_size:
            raise ConfigError(
                f"the launcher's variables contradict each other: rank {self.rank} of {self.world_size}, local "
                f"rank {self.local_rank} of {self.local_world_size}."
            )

    def variables(self) -> dict[str, str]:
        """The variables by which a process is told this place."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def read_launch(environ: Mapping[str, str] | None = None) -> Launch:
    """Read the variables of whatever launcher started this process.

    Raises:
        ConfigError: A variable is missing or no number.
    """
    environ = os.environ if environ is None else environ
    if "WORLD_SIZE" in environ and ("RANK" in environ or environ["WORLD_SIZE"] != "1"):
        return _torchrun(environ)
    if int_variable(environ, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _slurm(environ)
    return Launch()


def _torchrun(environ: Mapping[str, str]) -> Launch:
    world_size = int_variable(environ, "WORLD_SIZE")
    rank = int_variable(environ, "RANK")
    local_world = int_variable(environ, "LOCAL_WORLD_SIZE", int_variable(environ, "LOCAL_SIZE", world_size))
    return Launch(
        rank=rank,
        world_size=world_size,
        local_rank=int_variable(environ, "LOCAL_RANK", rank % local_world),
        local_world_size=local_world,
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=int_variable(environ, "MASTER_PORT", DEFAULT_PORT),
        launcher="torchrun",
    )


def _slurm(environ: Mapping[str, str]) -> Launch:
    world_size = int_variable(environ, "SLURM_STEP_NUM_TASKS")
    tasks = tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", str(world_size)))
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    port = 20000 + int_variable(environ, "SLURM_JOB_ID", 0) % 20000  # two jobs on one host rarely meet
    return Launch(
        rank=int_variable(environ, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=int_variable(environ, "SLURM_LOCALID"),
        local_world_size=tasks[int_variable(environ, "SLURM_NODEID", 0)],
        master_addr=environ.get("MASTER_ADDR", first_host(nodes)),
        master_port=int_variable(environ, "MASTER_PORT", port),
        launcher="slurm",
    )


def first_host(nodelist: str) -> str:
    """The first host of SLURM's compact list: ``gpu[003-005,9],login1`` begins with ``gpu003``."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodelist)
    if match is None:
        raise ConfigError(f"SLURM_STEP_NODELIST: {nodelist!r} names no host; set MASTER_ADDR.")
    prefix, number, suffix = match.groups()
    return f"{prefix}{number or ''}{suffix}"


def tasks_per_node(text: str) -> list[int]:
    """SLURM's ``4(x2),1`` as ``[4, 4, 1]``."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE: {text!r} is not of the form 4(x2),1.")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def int_variable(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    """A variable that holds a whole number.

    Raises:
        ConfigError: It is none, or is not there and has no default.
    """
    value = environ.get(name)
    if value is None and default is not None:
        return default
    try:
        return int(value or "")
    except ValueError:
        raise ConfigError(
            f"the environment variable {name} is {value!r}, not a number. Start several processes with torchrun, "
            "srun, accelerate launch or deepspeed, which set it."
        ) from None


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """``"auto"`` is the GPU of this process where there is one; other names are torch's.

    Raises:
        ConfigError: There is no such device here.
    """
    import torch

    if name == "auto":
        return _gpu(local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"device: {name!r} is not a device of torch; use auto, cpu, cuda or cuda:1."
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {name!r} asked for, but torch sees no GPU here. Use --device cpu.")
    return _gpu(local_rank) if device == torch.device("cuda") else device


def _gpu(local_rank: int) -> torch.device:
    import torch

    count = torch.cuda.device_count()
    if count == 1:  # a launcher that shows each process its own GPU only
        return torch.device("cuda", 0)
    if local_rank >= count:
        raise ConfigError(
            f"process {local_rank} of this host has no GPU: torch sees {count}. Start at most {count} processes."
        )
    return torch.device("cuda", local_rank)
