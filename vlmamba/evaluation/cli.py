"""What ``vlmamba eval`` calls: a checkpoint over tasks, and the scoring of answer files.

Nothing is printed here; `vlmamba.evaluation.tables.format_results` makes the text of what is returned.
"""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from vlmamba.common.files import read_json, replace_json
from vlmamba.common.load import load_model
from vlmamba.common.processes import Group
from vlmamba.errors import ConfigError, DataError, MissingDependencyError, MissingFileError
from vlmamba.evaluation.predictions import score_predictions as score_predictions
from vlmamba.evaluation.records import read_records, record_key, remove_answers
from vlmamba.evaluation.scoring import given_answers
from vlmamba.evaluation.task import FOLDER, Task, load_task, task_file
from vlmamba.registry import check_named, users_words

RESULTS_FILE = "results.json"


def evaluate_checkpoint(
    checkpoint: str | Path,
    tasks: Sequence[str] | str,
    output: str | Path | None = None,
    batch_size: int | Literal["auto"] = "auto",
    limit: int | None = None,
    shuffle_images: bool = False,
    *,
    conversations: int = 0,
    fresh: bool = False,
    progress: bool = True,
    folder: str | Path = "eval",
    options: Mapping[str, Any] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    switches: Mapping[str, Any] | None = None,
    ranks: Group | None = None,
) -> dict[str, Any]:
    """Ask a checkpoint the questions of some tasks; write answers, submissions and ``results.json``.

    Args:
        checkpoint: A run or an exported model directory.
        tasks: Names or paths (see `load_task`), as a list or separated by commas.
        output: Where results go; ``eval`` in the checkpoint's directory when left out. An evaluation that was
            stopped goes on there.
        batch_size: Questions at a time, or "auto" (see `vlmamba.evaluation.runner.evaluate`).
        limit: Only the first so many questions of each task.
        shuffle_images: Ask everything a second time with the pictures shuffled among the questions: the blind
            baseline.
        conversations: Also ask so many pictures several questions in one conversation (for the report).
        fresh: Ask again what was already answered.
        progress: Show bars.
        folder: Where tasks given by name live.
        options: Of the tasks' functions (``annotations``, ``images``, ...), for all tasks asked.
        device: Where to compute; "auto" is the GPU where there is one.
        dtype: "float32", "bfloat16" or "float16"; "auto" is bfloat16 on a GPU and float32 elsewhere.
        switches: Changes of the trained connector (`vlmamba.evaluation.switches`).
        ranks: This process among those that share the questions; it alone when left out.

    Returns:
        What is in ``results.json``: ``{"checkpoint", "model", "tasks": {name: result}, "conversations"}``; a
        result is that of `vlmamba.evaluation.runner.evaluate` with "spec", "description", "predictions" (file
        name) and, where there is one, "submission" (file name, or why there is none) and "shuffled" (a
        result). Results that the file holds of other tasks, for the same weights, stay in it.

    Raises:
        ConfigError: An unknown task, or none; or nothing can be written to `output`.
        MissingFileError: No such checkpoint or task file.
        DataError: See `vlmamba.evaluation.runner.evaluate`.
    """
    loaded = load_tasks(tasks, folder, options)
    from vlmamba.evaluation.conversations import hold_conversations
    from vlmamba.evaluation.runner import evaluate
    from vlmamba.evaluation.switches import apply_switches

    ranks = ranks or Group()
    model, processor = load_model(checkpoint, device=device, dtype=dtype)
    apply_switches(model, processor, switches or {})
    target = _output_folder(Path(checkpoint) / "eval" if output is None else Path(output))
    results: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "model": describe_model(model, processor),
        "tasks": {},
        "conversations": [],
    }
    results["tasks"] = ranks.on_main(lambda: _earlier_tasks(target / RESULTS_FILE, results["model"]))
    for spec, task in loaded.items():
        result: dict[str, Any] = {"spec": spec, "folder": str(folder), "options": dict(options or {})}
        result["description"] = task.description
        for shuffled in (False, True) if shuffle_images else (False,):
            path = target / (f"{task.name}.shuffled.jsonl" if shuffled else f"{task.name}.jsonl")
            if fresh:
                ranks.on_main(functools.partial(remove_answers, path))
            how: dict[str, Any] = {"limit": limit, "shuffle_images": shuffled, "progress": progress}
            how["switches"] = switches
            measured = evaluate(model, processor, task, path, batch_size=batch_size, **how, ranks=ranks)
            measured["predictions"] = path.name
            result.update({"shuffled": measured} if shuffled else measured)
        if ranks.is_main:
            result.update(_submit(task, target, limit))
            missing = conversations - len(results["conversations"])
            results["conversations"] += hold_conversations(model, processor, task, missing)
            results["tasks"][task.name] = result
            replace_json(target / RESULTS_FILE, results)
    return ranks.on_main(lambda: results)


def _output_folder(target: Path) -> Path:
    """The folder for results, made if need be.

    Raises:
        ConfigError: It cannot be made, or nothing can be written there.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target).close()
    except OSError as error:
        raise ConfigError(
            f"results cannot be written to {target}: {error.strerror}. Choose another folder (--output)"
        ) from error
    return target


def load_tasks(
    tasks: Sequence[str] | str, folder: str | Path = "eval", options: Mapping[str, Any] | None = None
) -> dict[str, Task]:
    """Tasks by the words they were asked for.

    Raises:
        ConfigError: One is unknown, there is none, or two have the same name.
    """
    with users_words():
        loaded = {spec: load_task(spec, folder=folder, **(options or {})) for spec in _split(tasks)}
    names = Counter(task.name for task in loaded.values())
    if len(names) < len(loaded):
        raise ConfigError(f"two of the tasks {', '.join(loaded)} are called {names.most_common(1)[0][0]!r}")
    return loaded


def reload_task(result: Mapping[str, Any]) -> Task:
    """The task of a result in ``results.json``.

    Raises:
        DataError: Its questions are others now than those that were asked.
        ConfigError: It is in a file that nobody has named here and that is not in ``eval/``.
    """
    place = task_file(result["spec"], result["folder"])
    if place is not None and place.resolve().parent != Path(FOLDER).resolve():
        check_named(str(place), "task")
    task = load_task(result["spec"], folder=result["folder"], **result.get("options", {}))
    asked = result.get("settings", {}).get("data", task.fingerprint)
    if asked != task.fingerprint:
        raise DataError(
            f"the questions of {result['spec']!r} have changed since they were asked: the data had fingerprint "
            f"{asked} then and have {task.fingerprint} now. Ask again, or restore the data"
        )
    return task


def _earlier_tasks(file: Path, model: Mapping[str, Any]) -> dict[str, Any]:
    """Results of other tasks that an earlier call wrote about the same weights."""
    if not file.is_file():
        return {}
    earlier = read_json(file, error=DataError)
    same = earlier.get("model", {}).get("fingerprint") == model["fingerprint"]
    return dict(earlier["tasks"]) if same else {}


def _submit(task: Task, target: Path, limit: int | None) -> dict[str, Any]:
    """Write the file that the benchmark's server wants, where there is one."""
    if task.submission is None:
        return {}
    if limit is not None and limit < len(task.samples):
        return {"submission": {"file": None, "why": f"only the first {limit} questions were asked"}}
    records = {record_key(record): record for record in read_records(target / f"{task.name}.jsonl")}
    path = target / f"{task.name}.submission{task.submission_suffix}"
    try:
        written = task.submission(task.samples, given_answers(task, task.samples, records), path)
    except (DataError, MissingFileError, MissingDependencyError) as error:
        return {"submission": {"file": None, "why": str(error)}}
    return {"submission": {"file": str(written.relative_to(target)), "why": None}}


def describe_model(model: Any, processor: Any) -> dict[str, Any]:
    """Connector, parameters of each part and tokens an image, for results and reports."""
    parts = ("vision_tower", "multi_modal_projector", "language_model")
    from vlmamba.evaluation.runner import model_fingerprint

    return {
        "fingerprint": model_fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "connector": model.multi_modal_projector.name,
        "connector_options": dict(model.multi_modal_projector.options),
        "parameters": {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in parts},
        "image_tokens": processor.num_image_tokens,
    }


def _split(tasks: Sequence[str] | str) -> list[str]:
    words = (
        tasks.split(",") if isinstance(tasks, str) else [word for task in tasks for word in task.split(",")]
    )
    specs = list(dict.fromkeys(word.strip() for word in words if word.strip()))
    if not specs:
        raise ConfigError("no task given: name at least one, such as playground")
    return specs
