"""The folder of a run, which one process at a time may write to, and where it runs.

config.yaml  environment.json  log.jsonl  bad_samples.jsonl  tensorboard/
checkpoints/step-000123/  checkpoints/latest
export/
"""

from __future__ import annotations

import contextlib
import logging
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vlmamba.common.files import locked, read_json, replace_json, sweep
from vlmamba.errors import CheckpointError, ConfigError
from vlmamba.training.checkpoint import CHECKPOINTS, latest_step

logger = logging.getLogger(__name__)

LOCK = ".lock"
PACKAGES = (
    "vlmamba",
    "torch",
    "transformers",
    "open_clip_torch",
    "tokenizers",
    "numpy",
    "pillow",
    "mamba-ssm",
)


@contextmanager
def claimed(run_dir: Path, *, resume: bool) -> Iterator[int | None]:
    """Hold a run's folder for this process alone; the system lets go of it when the process ends, however it ends.

    Args:
        run_dir: Created when not there. What a killed run left half-written in it is removed.
        resume: Continue where a checkpoint is; a run stopped before its first checkpoint starts anew.

    Yields:
        The step to continue from, or None to start at the beginning.

    Raises:
        ConfigError: Another process writes to the folder, it is in use and `resume` is off, or it holds something that
            is no run.
        CheckpointError: The folder cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        contents = _contents(run_dir)
        if contents and not {"config.yaml", CHECKPOINTS} & set(contents):
            shown = ", ".join(contents[:5])
            raise ConfigError(f"{run_dir} is not empty and holds no run ({shown}). Choose another --output.")
        (run_dir / LOCK).touch()
    except OSError as error:
        raise CheckpointError(
            f"the run's folder {run_dir} cannot be written: {error}. Choose another --output."
        ) from error
    with locked(run_dir / LOCK, busy=f"the run folder {run_dir}"):
        step = latest_step(run_dir)
        if not resume and _contents(run_dir):
            what, way = "that stopped before its first checkpoint", "Start it anew"
            if step is not None:
                what, way = f"with a checkpoint at step {step}", "Continue it"
            raise ConfigError(
                f"{run_dir} holds a run {what}. {way} with --resume, or choose another --output."
            )
        for folder in (run_dir, run_dir / CHECKPOINTS):
            sweep(folder, below=False)
        yield step


def _contents(run_dir: Path) -> list[str]:
    return sorted(p.name for p in run_dir.iterdir() if p.name != LOCK and not p.name.endswith(".tmp"))


def write_environment(path: Path, device: torch.device, *, start_step: int) -> None:
    """Record where the run runs; one entry for each start of it."""
    starts: list[Any] = []
    if path.exists():
        try:
            starts = list(read_json(path)["starts"])
        except (CheckpointError, TypeError, KeyError) as error:
            logger.warning(
                "%s is damaged (%s): earlier starts of the run are not in it any more", path, error
            )
    replace_json(path, {"starts": [*starts, {"start_step": start_step, **environment(device)}]})


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, commit and devices of this process."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": versions,
        "git_commit": git_commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }


def git_commit() -> str | None:
    """Commit of the current directory, with ``-dirty`` when files differ from it; None outside a
    repository.
    """
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip() or None
