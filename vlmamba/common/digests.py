"""Files and what was in them when they were written: a SHA-256 each, compared before they are read.

A digest finds damage and files that do not belong together. It is no signature: who can write a file can write its
digest too. That reading runs no code does not rest on it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmamba.common.files import digest, read_json, replace_json
from vlmamba.errors import CheckpointError

logger = logging.getLogger(__name__)

DIGESTS = "digests.json"
"""The file of a folder that has no other place for the digests of its files, such as an export."""


def digests_of(folder: Path, files: Iterable[Path] | None = None) -> dict[str, str]:
    """Digests by name relative to a folder; of all files in it unless some are given."""
    found = [p for p in folder.rglob("*") if p.is_file()] if files is None else files
    return {p.relative_to(folder).as_posix(): digest(p) for p in sorted(found)}


def seal(content: Mapping[str, Any]) -> str:
    """The digest of plain values, whatever the order and the spaces in which they are written."""
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def fault(folder: Path, name: str, wanted: str) -> str | None:
    """What is wrong with a file, if anything."""
    file = folder / name
    try:
        found = digest(file)
    except FileNotFoundError:
        return f"{file} is missing"
    except OSError as error:
        return f"{file} cannot be read ({error.strerror or error})"
    return (
        None
        if found == wanted
        else f"{file} is not what was written (SHA-256 {found[:12]}, not {wanted[:12]})"
    )


def write_digests(folder: Path) -> None:
    """Write down what is in a folder that is complete."""
    replace_json(folder / DIGESTS, {"sha256": digests_of(folder)})


def read_digests(folder: Path) -> dict[str, str] | None:
    """What `write_digests` wrote down; None where nothing is written down.

    Raises:
        CheckpointError: The file is damaged.
    """
    file = folder / DIGESTS
    if not file.is_file():
        return None
    content = read_json(file)
    digests = content.get("sha256") if isinstance(content, dict) else None
    if not isinstance(digests, dict) or not all(isinstance(value, str) for value in digests.values()):
        raise CheckpointError(f"{file} is damaged: it does not hold a digest for each file.")
    return digests


def check_folder(folder: Path, names: Sequence[str] | None = None) -> None:
    """Compare the files of a folder with its `DIGESTS`; where it has none, say so in one line of warning.

    Args:
        folder: Such as an export.
        names: Only these of its files, without a warning.

    Raises:
        CheckpointError: A file is missing or is not what was written.
    """
    digests = read_digests(folder)
    if digests is None and names is None:
        logger.warning(
            "%s has no %s (an older version wrote it): its files are not verified", folder, DIGESTS
        )
    for name, wanted in (digests or {}).items():
        if (names is None or name in names) and (problem := fault(folder, name, wanted)):
            raise CheckpointError(
                f"{problem}. Copy or export it again; if it was changed on purpose, remove {folder / DIGESTS}."
            )
