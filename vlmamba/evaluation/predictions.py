"""Scoring answer files of any model, without one: reading, matching with the questions, scoring.

Nothing here imports torch.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmamba.errors import ConfigError, DataError, MissingFileError
from vlmamba.evaluation.layouts import read_document
from vlmamba.evaluation.records import Record, read_records, record_key
from vlmamba.evaluation.scoring import given_answers, score_records
from vlmamba.evaluation.task import Task, load_task

MERGED = "merge.jsonl"
SHARD = re.compile(r"(\d+)_(\d+)\.jsonl")
"""LLaVA's answer files of several processes: ``<number of them>_<which>.jsonl``."""


def score_predictions(
    task: Task | str,
    predictions: str | Path,
    annotations: str | Path | None = None,
    *,
    allow_missing: bool = False,
    folder: str | Path = "eval",
    submission: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Score an answer file of any model; needs no model.

    Args:
        task: A task, or its name or path.
        predictions: JSON lines with ``question_id`` and ``text``, and ``prompt`` where ids are not unique
            (LLaVA's answer files; a folder of its shards too), or a file in the benchmark's own layout.
        annotations: The task's data when they are not in their usual place.
        allow_missing: Count unanswered questions as wrong instead of refusing.
        folder: Where tasks given by name live.
        submission: Also write the file that the benchmark's server wants.
        options: Further options of the task's function.

    Returns:
        What `vlmamba.evaluation.scoring.score_records` returns, and "submission" (a path) where one was
        written.

    Raises:
        DataError: The file is empty, of another task, answers a question twice, unknown questions, or not all
            of them; or the answers are not public and no submission is asked for.
        MissingFileError: There is no such file.
        ConfigError: The task is unknown, or has no submission file.
    """
    if isinstance(task, str):
        given = {**(options or {}), "annotations": None if annotations is None else str(annotations)}
        task = load_task(task, folder=folder, **given)
    elif annotations is not None or options:
        raise ConfigError(
            "annotations are read when a task is loaded: give the task's name, or no annotations"
        )
    if submission is not None and task.submission is None:
        raise ConfigError(f"task {task.name!r} has no file for a server")
    records = match_answers(task, read_answers(task, predictions), predictions, allow_missing=allow_missing)
    result = score_records(task, task.samples, records)
    if submission is not None and task.submission is not None:
        path = task.submission(task.samples, given_answers(task, task.samples, records), Path(submission))
        result["submission"] = str(path)
    elif "note" in result["metrics"] and result["headline"]["value"] is None:
        raise DataError(
            f"{task.name!r} cannot be scored here: {result['metrics']['note']} (--submission FILE)"
        )
    return result


def read_answers(task: Task, path: str | Path) -> list[Record]:
    """Records of an answer file, in the benchmark's own layout or in LLaVA's.

    Raises:
        MissingFileError: There is no such file.
        DataError: It holds no answer, or is of another layout.
    """
    file = Path(path)
    if not file.exists():
        raise MissingFileError(f"there is no predictions file {file}.")
    records = task.reader(file, task.samples) if task.reader is not None and not _is_empty(file) else None
    if records is None:
        records = [record for part in _parts(file) for record in _lines(part, task)]
    if not records:
        raise DataError(f"{file} holds no answer{_found_instead(file, task)}")
    empty = [r for r in records if not isinstance(r["text"], str | int | float)]
    if empty:
        examples = ", ".join(f"{r['question_id']!r} ({r['text']!r:.40})" for r in empty[:3])
        raise DataError(
            f"{file}: {len(empty)} of {len(records)} answers are no text, such as those to the questions {examples}: "
            "leave a question out where there is no answer"
        )
    return records


def _found_instead(file: Path, task: Task) -> str:
    """What a file holds that is no answer to the task, in words."""
    if not file.is_file() or _is_empty(file):
        return ""
    try:
        found = read_document(file).summary
    except DataError as error:
        return f": {error}"
    own = " nor the benchmark's own layout" if task.reader is not None else ""
    return f" to {task.name!r}: {found}. That is neither LLaVA's answer layout (question_id, text){own}"


def match_answers(
    task: Task, records: Sequence[Record], path: str | Path, *, allow_missing: bool = False
) -> dict[tuple[str, str], Record]:
    """Answers by the key of their question: by id where ids are unique, else by id and prompt.

    Raises:
        DataError: A question is answered twice, not asked, or (without `allow_missing`) not answered; the
            message counts them and names the first.
    """
    by_id = {key[0]: key for key in (sample.key for sample in task.samples)}
    unique = len(by_id) == len(task.samples)
    keys = [by_id.get(record_key(r)[0], record_key(r)) if unique else record_key(r) for r in records]
    asked, given = {sample.key for sample in task.samples}, Counter(keys)
    double = [key for key, count in given.items() if count > 1]
    strange = [key for key in given if key not in asked]
    missing = [] if allow_missing else [s.key for s in task.samples if s.key not in given]
    sizes = f"the file has {len(records)} answers, the task {len(task.samples)} questions"
    if len(strange) == len(given):
        known = any(key in by_id for key, _ in strange)
        why = (
            "their ids are the task's, their prompts are not: ids are not unique here, so each line needs "
            f'"prompt" with the question as it was asked, such as {task.samples[0].text!r}'
            if known and not unique
            else f"ids are such as {', '.join(repr(key) for key, _ in strange[:3])}, the task's such as "
            f"{', '.join(repr(s.key[0]) for s in task.samples[:3])}. Is this the file of another task?"
        )
        raise DataError(f"{path}: no answer is to a question of {task.name!r}; {why} ({sizes})")
    for ids, what in (
        (double, "answered twice"),
        (strange, f"not asked by {task.name}"),
        (missing, "not answered"),
    ):
        if ids:
            examples = ", ".join(
                repr(key) if unique else f"{key!r} ({prompt.partition(chr(10))[0]!r:.80})"
                for key, prompt in ids[:3]
            )
            advice = " (--allow-missing counts them as wrong)" if ids is missing else ""
            raise DataError(f"{path}: {len(ids)} question(s) {what}{advice}, such as {examples}; {sizes}")
    return dict(zip(keys, records, strict=True))


def _is_empty(file: Path) -> bool:
    return file.is_file() and not file.read_bytes()[:1024].strip()


def _parts(file: Path) -> list[Path]:
    """The files to read: the one given, or in a folder LLaVA's merged file or its shards, all of them."""
    if file.is_file():
        return [file]
    if (file / MERGED).is_file():
        return [file / MERGED]
    shards = {p: SHARD.fullmatch(p.name) for p in file.glob("*.jsonl")}
    found = sorted((int(m[1]), int(m[2]), p) for p, m in shards.items() if m)
    if not found:
        raise DataError(f"{file} is a folder without {MERGED} or LLaVA's shards (<number>_<which>.jsonl)")
    count = found[0][0]
    if [(n, k) for n, k, _ in found] != [(count, k) for k in range(count)]:
        names = ", ".join(p.name for _, _, p in found[:6])
        raise DataError(f"{file} does not hold shards 0 to {count - 1} of one run: {names}")
    return [p for _, _, p in found]


def _lines(file: Path, task: Task) -> list[Record]:
    try:
        return read_records(file)
    except DataError as error:
        own = " nor in the benchmark's own layout" if task.reader is not None else ""
        raise DataError(f"{error}. It is not in LLaVA's answer layout{own} (task {task.name!r})") from error


def format_result(result: Mapping[str, Any]) -> str:
    """A result as JSON text; numbers that JSON lacks are refused."""
    return json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False, default=str)
