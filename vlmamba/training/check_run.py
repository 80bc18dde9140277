"""Is every file of a run what was written: ``vlmamba check run DIR``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vlmamba.common.digests import DIGESTS, fault, read_digests
from vlmamba.common.files import read_json
from vlmamba.config import load_yaml
from vlmamba.errors import MissingFileError, VLMambaError
from vlmamba.training.checkpoint import CHECKPOINTS, LATEST, STATE, complete_checkpoints, read_state
from vlmamba.training.metrics import read_log

READERS: Mapping[str, Callable[[Path], Any]] = {
    "config.yaml": load_yaml,
    "environment.json": read_json,
    "log.jsonl": read_log,
    "eval.jsonl": read_log,
}
"""Files of a run without a digest, which grow or may be edited: they are read."""


class Finding(NamedTuple):
    """What is known of one file."""

    file: str
    size: int
    verdict: str
    damaged: bool


def check_run(folder: Path) -> list[Finding]:
    """Look at every file of a run, of a checkpoint or of an exported model.

    Raises:
        MissingFileError: The folder is none of them.
    """
    findings = [
        Finding(str(file.relative_to(folder)), file.stat().st_size if file.is_file() else 0, *verdict)
        for file, verdict in _look(folder)
    ]
    if not findings:
        raise MissingFileError(f"{folder} is no run, no checkpoint and no exported model.")
    return findings


def _look(folder: Path) -> Iterator[tuple[Path, tuple[str, bool]]]:
    """Each file with what is said of it, and whether it is damaged."""
    for name, read in READERS.items():
        if (folder / name).is_file():
            problem, _ = _try(read, folder / name)
            yield folder / name, (problem or "readable", problem is not None)
    pointer = folder / CHECKPOINTS / LATEST
    if pointer.is_file():
        named = pointer.read_text(encoding="utf-8", errors="replace").strip()
        there = (folder / CHECKPOINTS / named / STATE).is_file()
        yield pointer, (named if there else f"names {named!r}, which is no checkpoint", not there)
    for path in [folder] if (folder / STATE).is_file() else complete_checkpoints(folder):
        yield from _folder(path, STATE, lambda path: read_state(path).files)
    for path in (folder, folder / "export", folder / "export_ema"):
        if (path / "config.json").is_file() or (path / DIGESTS).is_file():
            yield from _folder(path, DIGESTS, read_digests)


def _folder(path: Path, own: str, read: Callable[[Path], Any]) -> Iterator[tuple[Path, tuple[str, bool]]]:
    """A folder whose digests are in a file of its own."""
    problem, digests = _try(read, path)
    older = "no digests (an older version wrote it): its files are not verified"
    yield path / own, (problem or ("as written" if digests else older), problem is not None)
    for name, wanted in (digests or {}).items():
        problem = fault(path, name, wanted)
        yield path / name, (problem or "as written", problem is not None)


def _try(read: Callable[[Path], Any], path: Path) -> tuple[str | None, Any]:
    try:
        return None, read(path)
    except (VLMambaError, OSError) as error:
        return str(error), None
