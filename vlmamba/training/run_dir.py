"""The folder of a run, and files in it that are whole or not there at all.

config.yaml  environment.json  log.jsonl  bad_samples.jsonl  tensorboard/
checkpoints/step-000123/  checkpoints/latest
export/
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vlmamba.errors import CheckpointError, ConfigError

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


def sync_directory(path: Path) -> None:
    """Make renames in a folder survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_file(path: Path) -> None:
    """Wait until the file's bytes are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole: written beside it under a hidden name, then renamed.

    Raises:
        CheckpointError: The disk is full or fails; the file is as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(write_failure(path, error)) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


@contextmanager
def whole_directory(final: Path) -> Iterator[Path]:
    """A folder to write into that gets its name only when everything in it is on the disk.

    An existing folder of that name is replaced by the new one in two renames. When writing fails, the
    unfinished folder is removed and the existing one stays.

    Raises:
        CheckpointError: The disk is full, read-only or otherwise fails.
    """
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                sync_file(path)
        sync_directory(temporary)
        replaced = final.with_name(f".{final.name}.old")
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        temporary.rename(final)
        sync_directory(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(write_failure(final, error)) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def write_errors() -> Iterator[None]:
    """Turn what torch and safetensors raise when the system refuses a write back into an `OSError`."""
    from safetensors import SafetensorError

    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if "DataLoader worker" in str(error):  # torch raises it wherever the main thread is
            raise
        raise OSError(str(error).splitlines()[0]) from error


def write_failure(path: Path, error: BaseException) -> str:
    """The message for a write that the system refused."""
    folder = next((p for p in path.parents if p.exists()), Path())
    free = shutil.disk_usage(folder).free / 2**30
    return (
        f"writing {path} failed: {error} ({free:.2f} GiB free on that disk). Earlier checkpoints are "
        "unharmed and the "
        "unfinished one was removed. Make room (lower --keep_last, or another --output), then continue "
        "with --resume."
    )


def claim_run_dir(run_dir: Path, *, resume: bool, latest_step: Callable[[Path], int | None]) -> int | None:
    """Make sure that a run may write into its folder.

    Args:
        run_dir: Created when not there.
        resume: Continue where a checkpoint is; a run stopped before its first checkpoint starts anew.
        latest_step: Step of the newest complete checkpoint of a run folder, None if there is none.

    Returns:
        The step to continue from, or None to start at the beginning.

    Raises:
        ConfigError: The folder is in use and `resume` is off, or holds something that is no run.
        CheckpointError: The folder cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".write-test.tmp"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"the run's folder {run_dir} cannot be written: {error}. Choose another --output."
        ) from error
    contents = [p.name for p in run_dir.iterdir() if not p.name.endswith(".tmp")]
    if not contents:
        return None
    step = latest_step(run_dir)
    if resume and step is not None:
        return step
    if resume and "config.yaml" in contents:
        return None
    if not resume and step is not None:
        raise ConfigError(
            f"{run_dir} holds a run with a checkpoint at step {step}. Continue it with --resume, or choose "
            "another --output."
        )
    if not resume and "config.yaml" in contents:
        raise ConfigError(
            f"{run_dir} holds a run that stopped before its first checkpoint. Start it anew with --resume, "
            "or choose "
            "another --output."
        )
    shown = ", ".join(sorted(contents)[:5])
    raise ConfigError(f"{run_dir} is not empty and holds no run ({shown}). Choose another --output.")


def write_environment(path: Path, device: torch.device, *, start_step: int) -> None:
    """Record where the run runs; one entry for each start of it."""
    starts: list[Mapping[str, Any]] = []
    if path.exists():
        with contextlib.suppress(json.JSONDecodeError):
            starts = json.loads(path.read_text(encoding="utf-8"))["starts"]
    starts = [*starts, {"start_step": start_step, **environment(device)}]
    write_text(path, json.dumps({"starts": starts}, indent=2) + "\n")


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
