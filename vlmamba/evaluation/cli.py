"""What ``vlmamba eval`` calls: a checkpoint over tasks, and the scoring of answer files.

Nothing is printed here; `vlmamba.evaluation.tables.format_results` makes the text of what is returned.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmamba.errors import ConfigError, DataError
from vlmamba.evaluation.records import read_records, record_key
from vlmamba.evaluation.scoring import score_records
from vlmamba.evaluation.task import Sample, Task, load_task

RESULTS_FILE = "results.json"


def evaluate_checkpoint(
    checkpoint: str | Path,
    tasks: Sequence[str] | str,
    output: str | Path | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    shuffle_images: bool = False,
    *,
    conversations: int = 0,
    fresh: bool = False,
    progress: bool = True,
    folder: str | Path = "eval",
) -> dict[str, Any]:
    """Ask a checkpoint the questions of some tasks; write answers and ``results.json``.

    Args:
        checkpoint: A run or an exported model directory.
        tasks: Names or paths (see `load_task`), as a list or separated by commas.
        output: Where results go; ``eval`` in the checkpoint's directory when left out. An evaluation that was
            stopped goes on there.
        batch_size: Questions at a time.
        limit: Only the first so many questions of each task.
        shuffle_images: Ask everything a second time with the pictures shuffled among the questions: the blind
            baseline.
        conversations: Also ask so many pictures several questions in one conversation (for the report).
        fresh: Ask again what was already answered.
        progress: Show bars.
        folder: Where tasks given by name live.

    Returns:
        What is in ``results.json``: ``{"checkpoint", "model", "tasks": {name: result}, "conversations"}``; a
        result is that of `vlmamba.evaluation.runner.evaluate` with "spec", "description", "predictions" (file
        name) and, on request, "shuffled" (a result).

    Raises:
        ConfigError: An unknown task, or none.
        MissingFileError: No such checkpoint or task file.
        DataError: See `vlmamba.evaluation.runner.evaluate`.
    """
    specs = _split(tasks)
    loaded = {spec: load_task(spec, folder=folder) for spec in specs}
    names = Counter(task.name for task in loaded.values())
    if len(names) < len(loaded):
        raise ConfigError(f"two of the tasks {', '.join(specs)} are called {names.most_common(1)[0][0]!r}")
    from vlmamba.evaluation.runner import evaluate
    from vlmamba.models.builder import load_model

    model, processor = load_model(checkpoint)
    target = Path(checkpoint) / "eval" if output is None else Path(output)
    target.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "model": describe_model(model, processor),
        "tasks": {},
        "conversations": [],
    }
    for spec, task in loaded.items():
        result: dict[str, Any] = {"spec": spec, "folder": str(folder), "description": task.description}
        for shuffled in (False, True) if shuffle_images else (False,):
            name = f"{task.name}.shuffled.jsonl" if shuffled else f"{task.name}.jsonl"
            if fresh:
                (target / name).unlink(missing_ok=True)
            measured = evaluate(
                model,
                processor,
                task,
                target / name,
                batch_size=batch_size,
                limit=limit,
                shuffle_images=shuffled,
                progress=progress,
            )
            measured["predictions"] = name
            result.update({"shuffled": measured} if shuffled else measured)
        results["tasks"][task.name] = result
        results["conversations"] += _converse(
            model, processor, task, conversations - len(results["conversations"])
        )
    write_json(target / RESULTS_FILE, results)
    return results


def score_predictions(
    task: Task | str,
    predictions: str | Path,
    annotations: str | Path | None = None,
    *,
    allow_missing: bool = False,
    folder: str | Path = "eval",
) -> dict[str, Any]:
    """Score an answer file of any model; needs no model.

    Args:
        task: A task, or its name or path.
        predictions: JSON lines with ``question_id`` and ``text``, and ``prompt`` where ids are not unique.
        annotations: The task's annotation file when it is not in its usual place.
        allow_missing: Count unanswered questions as wrong instead of refusing.
        folder: Where tasks given by name live.

    Returns:
        ``{"task", "metrics", "counts"}``.

    Raises:
        DataError: The file is empty, answers a question twice, unknown questions, or not all of them.
    """
    if isinstance(task, str):
        task = load_task(task, folder=folder, annotations=None if annotations is None else str(annotations))
    elif annotations is not None:
        raise ConfigError(
            "annotations are read when a task is loaded: give the task's name, or no annotations"
        )
    records = read_records(predictions)
    if not records:
        raise DataError(f"{predictions} holds no answer")
    by_id = {key[0]: key for key in (sample.key for sample in task.samples)}
    unique = len(by_id) == len(task.samples)
    keys = [by_id.get(record_key(r)[0], record_key(r)) if unique else record_key(r) for r in records]
    asked, given = {sample.key for sample in task.samples}, Counter(keys)
    double = [key[0] for key, count in given.items() if count > 1]
    strange = [key[0] for key in given if key not in asked]
    missing = [] if allow_missing else [s.key[0] for s in task.samples if s.key not in given]
    for ids, what in (
        (double, "answered twice"),
        (strange, f"not asked by {task.name}"),
        (missing, "not answered"),
    ):
        if ids:
            examples = ", ".join(repr(i) for i in ids[:3])
            advice = " (allow_missing counts them as wrong)" if ids is missing else ""
            raise DataError(
                f"{predictions}: {len(ids)} question(s) {what}{advice}, such as {examples}; the file has "
                f"{len(records)} answers, the task {len(task.samples)} questions"
            )
    return score_records(task, task.samples, dict(zip(keys, records, strict=True)))


def describe_model(model: Any, processor: Any) -> dict[str, Any]:
    """Connector, parameters of each part and tokens an image, for results and reports."""
    parts = ("vision_tower", "multi_modal_projector", "language_model")
    return {
        "connector": model.multi_modal_projector.name,
        "connector_options": dict(model.multi_modal_projector.options),
        "parameters": {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in parts},
        "image_tokens": processor.num_image_tokens,
    }


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file as a whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _split(tasks: Sequence[str] | str) -> list[str]:
    words = (
        tasks.split(",") if isinstance(tasks, str) else [word for task in tasks for word in task.split(",")]
    )
    specs = list(dict.fromkeys(word.strip() for word in words if word.strip()))
    if not specs:
        raise ConfigError("no task given: name at least one, such as playground")
    return specs


def _converse(model: Any, processor: Any, task: Task, count: int) -> list[dict[str, Any]]:
    """Several questions about one picture in one conversation, for up to `count` pictures."""
    from vlmamba.evaluation.runner import check_images, converse

    talks = []
    for samples in pick_conversations(task, count):
        check_images(samples)
        replies = converse(model, processor, samples, max_new_tokens=task.max_new_tokens)
        right = task.score(samples, [reply.text for reply in replies]).correct
        turns = [
            {"question": s.text, "expected": s.answer, "given": reply.text, "right": ok}
            for s, reply, ok in zip(samples, replies, right, strict=True)
        ]
        talks.append({"task": task.name, "question_ids": [s.question_id for s in samples], "turns": turns})
    return talks


def pick_conversations(task: Task, count: int, *, longest: int = 4) -> list[list[Sample]]:
    """Questions that share their pictures, spread over the task: different kinds first, at least two in a
    group.
    """
    groups: dict[tuple[Any, ...], list[Sample]] = defaultdict(list)
    for sample in task.samples:
        if sample.images and all(isinstance(image, Path) for image in sample.images):
            groups[sample.images].append(sample)
    chosen = []
    for members in groups.values():
        nth: Counter[str] = Counter()
        ranked = []
        for at, sample in enumerate(members):
            ranked.append((nth[sample.category], at, sample))
            nth[sample.category] += 1
        if len(members) > 1:
            chosen.append([sample for _, _, sample in sorted(ranked, key=lambda r: r[:2])[:longest]])
    chosen.sort(key=len, reverse=True)
    best = [talk for talk in chosen if len(talk) == len(chosen[0])] if chosen else []
    pool = best if len(best) >= count else chosen
    step = max(1, len(pool) // max(1, count))
    return pool[::step][: max(0, count)]
