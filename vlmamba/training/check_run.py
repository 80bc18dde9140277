"""Is every file of a run what was written: ``vlmamba check run DIR``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vlmamba.common.digests import DIGESTS, fault, read_digests
from vlmamba.common.files import read_json
from vlmamba.config import load_yaml
from vlmamba.errors import CheckpointError, MissingFileError, VLMambaError
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
    findings = []
    for file, problem, verdict in _look(folder):
        size = file.stat().st_size if file.is_file() else 0
        findings.append(Finding(str(file.relative_to(folder)), size, problem or verdict, problem is not None))
    if not findings:
        raise MissingFileError(f"{folder} is no run, no checkpoint and no exported model.")
    return findings


def _look(folder: Path) -> Iterator[tuple[Path, str | None, str]]:
    """Each file with its problem, or with what is said where it has none."""
    for name, read in READERS.items():
        if (folder / name).is_file():
            yield folder / name, _problem(read, folder / name), "readable"
    pointer = folder / CHECKPOINTS / LATEST
    if pointer.is_file():
        named = pointer.read_text(encoding="utf-8", errors="replace").strip()
        there = (folder / CHECKPOINTS / named / STATE).is_file()
        yield pointer, None if there else f"names {named!r}, which is no checkpoint", named
    for checkpoint in [folder] if (folder / STATE).is_file() else complete_checkpoints(folder):
        yield from _checkpoint(checkpoint)
    exports = [e for e in (folder, folder / "export", folder / "export_ema") if (e / "config.json").is_file()]
    for export in exports:
        yield from _export(export)


def _checkpoint(path: Path) -> Iterator[tuple[Path, str | None, str]]:
    problem = _problem(read_state, path / STATE, path)
    digests = {} if problem else read_state(path).files
    yield (
        path / STATE,
        problem,
        "as written" if digests else "readable (no digests: an older version wrote it)",
    )
    yield from _files(path, digests)


def _export(path: Path) -> Iterator[tuple[Path, str | None, str]]:
    problem = _problem(read_digests, path / DIGESTS, path)
    digests = None if problem else read_digests(path)
    if problem or digests is None:
        yield path / DIGESTS, problem, "not there (an older version wrote the export): files not verified"
    yield from _files(path, digests or {})


def _files(folder: Path, digests: Mapping[str, str]) -> Iterator[tuple[Path, str | None, str]]:
    for name, wanted in digests.items():
        yield folder / name, fault(folder, name, wanted), "as written"


def _problem(read: Callable[[Path], Any], file: Path, argument: Path | None = None) -> str | None:
    try:
        read(argument or file)
    except (VLMambaError, CheckpointError, OSError) as error:
        return str(error)
    return None
