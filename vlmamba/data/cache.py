"""The cache folder: results that take long and can be computed again, written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """``$VLMAMBA_CACHE``, or ``~/.cache/vlmamba``."""
    return Path(os.environ.get("VLMAMBA_CACHE") or Path.home() / ".cache" / "vlmamba")


def cache_name(kind: str, *key: object) -> str:
    """``kind-<hash of the key>.npy``."""
    return f"{kind}-{hashlib.sha256(repr(key).encode()).hexdigest()[:20]}.npy"


def file_key(path: Path) -> tuple[str, int, int]:
    """Path, size and time of change: another value means another content."""
    stat = path.stat()
    return str(path), stat.st_size, stat.st_mtime_ns


def load_array(path: Path, *, columns: int, mapped: bool = False) -> np.ndarray | None:
    """A kept table of so many columns, or None when there is none or it is damaged.

    Args:
        path: The file.
        columns: How many columns it must have.
        mapped: Leave it on the disk; pages are shared by all processes that read them.
    """
    try:
        values: np.ndarray = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return values if values.ndim == 2 and values.shape[1] == columns else None


def save_array(path: Path, values: np.ndarray) -> None:
    """Write to a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, values)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def keep_array(path: Path, values: np.ndarray) -> None:
    """As `save_array`, but a cache folder that cannot be written costs time and no more."""
    try:
        save_array(path, values)
    except OSError as error:
        logger.warning("%s cannot be written (%s); what is in it is found anew next time", path, error)


@contextlib.contextmanager
def one_process(path: Path) -> Iterator[None]:
    """Let one process of a host at a time make a kept file; the others wait, and then find it there.

    The system releases the lock of a process that ends. Where a folder cannot be written or locked, nobody waits.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.with_suffix(".lock").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
