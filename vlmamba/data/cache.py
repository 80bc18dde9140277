"""Tables that take long to find and can be found again, kept in the cache folder."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vlmamba.common.files import cache_folder, locked, replaced
from vlmamba.errors import WriteError

logger = logging.getLogger(__name__)


def file_key(path: Path) -> tuple[str, int, int]:
    """Path, size and time of change: another value means another content."""
    stat = path.stat()
    return str(path), stat.st_size, stat.st_mtime_ns


def kept_table(
    kind: str,
    key: tuple[object, ...],
    find: Callable[[], np.ndarray],
    *,
    columns: int,
    folder: Path | None = None,
    mapped: bool = True,
) -> np.ndarray:
    """A table as it was kept, or as it is found now.

    Of several processes of a host that find none, one looks; the others wait. A folder that cannot be written costs
    time and no more.

    Args:
        kind: What it is a table of; begins the file's name.
        key: Everything that it depends on.
        find: Makes it.
        columns: How many columns it has; a kept one of another shape is damaged.
        folder: Instead of the cache folder.
        mapped: Leave it on the disk; pages are shared by all processes that read them.
    """
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:20]
    path = (folder or cache_folder()) / f"{kind}-{digest}.npy"
    found = _load(path, columns, mapped)
    if found is None:
        with locked(path.with_suffix(".lock"), busy=None):
            found = _load(path, columns, mapped)
            if found is None:
                found = find()
                try:
                    with replaced(path) as unfinished, unfinished.open("wb") as file:
                        np.save(file, found)
                except WriteError as error:
                    logger.warning("%s What is in it is found anew next time.", error)
    return found


def _load(path: Path, columns: int, mapped: bool) -> np.ndarray | None:
    try:
        values: np.ndarray = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return values if values.ndim == 2 and values.shape[1] == columns else None
