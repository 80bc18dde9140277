"""A report: one HTML file that needs nothing else, on any screen, offline.

Headline figures, accuracy by kind of question beside the blind baseline, loss curves, times, settings, and a
gallery of answers, right and wrong. Pictures are embedded; the page runs no script and its content policy
forbids any load.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmamba.common.files import read_json
from vlmamba.errors import DataError, MissingFileError
from vlmamba.evaluation.cli import RESULTS_FILE, reload_task
from vlmamba.evaluation.gallery import Shown, Talk, common_suffix, pick_answers, read_talks
from vlmamba.evaluation.tables import (
    RunLog,
    duration,
    figure,
    headline_row,
    interval,
    notes_of,
    percent,
    rate_rows,
    read_run,
)
from vlmamba.evaluation.task import Task
from vlmamba.pages import write_page
from vlmamba.pages.charts import chart, loss_series

SETTINGS = (
    ("Encoder", ("model.vision.family", "model.vision.path")),
    ("Feature layer", ("model.vision.feature_layer",)),
    ("Connector", ("model.connector.name", "model.connector.options")),
    ("Language model", ("model.language.path",)),
    ("Chat template", ("model.chat",)),
    ("Trains", ("train",)),
    ("Epochs", ("epochs",)),
    ("Steps at most", ("max_steps",)),
    ("Batch size", ("batch.global_batch_size",)),
    ("Optimizer", ("optim.name",)),
    ("Learning rate", ("optim.lr",)),
    ("Weight decay", ("optim.weight_decay",)),
    ("Schedule", ("schedule.name",)),
    ("Precision", ("precision",)),
    ("Seed", ("seed",)),
)
"""Rows of the settings table: dotted keys of a run's config."""


def write_report(
    path: str | Path,
    *,
    title: str,
    runs: Sequence[str | Path | RunLog] = (),
    results: str | Path | Mapping[str, Any] | None = None,
    samples: Sequence[Shown] | None = None,
    conversations: Sequence[Talk] | None = None,
    subtitle: str = "",
    settings: Mapping[str, str] | None = None,
    timings: Sequence[tuple[str, float]] = (),
) -> Path:
    """Write a report.

    Args:
        path: The HTML file.
        title: Its heading.
        runs: Training runs (folders, or `read_run`'s), in the order of their stages.
        results: The folder that `evaluate_checkpoint` wrote, its ``results.json``, or what it returned.
        samples: Answers to show; when left out they are drawn from the answers beside ``results.json``.
        conversations: Conversations to show; when left out those of the results.
        subtitle: A sentence under the heading.
        settings: Further rows of the settings table.
        timings: Further rows of the time table (what, seconds), such as the set-up.

    Returns:
        The path.

    Raises:
        MissingFileError: A log, result, answer file or task is missing.
        DataError: There is nothing to show.
    """
    logs = [run if isinstance(run, RunLog) else read_run(run) for run in runs]
    found, folder = _read_results(results)
    if not logs and not found and not samples:
        raise DataError("a report needs runs, results or samples; none was given")
    if samples is None or conversations is None:
        drawn, talks = _draw(found, folder) if folder is not None else ([], [])
        samples = drawn if samples is None else samples
        conversations = talks if conversations is None else conversations
    suffix = common_suffix([s.question for s in samples])
    return write_page(
        path,
        "report.html",
        title=title,
        subtitle=subtitle,
        tiles=_tiles(logs, found),
        benchmarks=_benchmarks(found),
        checkpoint_note=_fingerprint_note(found),
        tasks=[(name, r, rate_rows(r), notes_of(r)) for name, r in found.get("tasks", {}).items()],
        percent=percent,
        interval=interval,
        charts=[_chart(log) for log in logs],
        times=_times(logs, found, timings),
        settings=_settings(logs, found, settings or {}),
        stages=[log.label for log in logs],
        gallery=_gallery(samples),
        talks=conversations,
        short=functools.partial(_without, suffix=suffix),
        suffix=suffix,
    )


def _read_results(results: str | Path | Mapping[str, Any] | None) -> tuple[Mapping[str, Any], Path | None]:
    if results is None:
        return {}, None
    if isinstance(results, Mapping):
        return results, None
    given = Path(results)
    file = given / RESULTS_FILE if given.is_dir() else given
    if not file.is_file():
        raise MissingFileError(
            f"no results {file}: give the folder that an evaluation wrote, or its {RESULTS_FILE}."
        )
    return read_json(file, error=DataError), file.parent


def _draw(results: Mapping[str, Any], folder: Path) -> tuple[list[Shown], list[Talk]]:
    tasks: dict[str, Task] = {}
    samples: list[Shown] = []
    for name, result in results["tasks"].items():
        tasks[name] = reload_task(result)
        samples += pick_answers(tasks[name], folder / result["predictions"])
    return samples, read_talks(results, tasks)


def _tiles(logs: Sequence[RunLog], results: Mapping[str, Any]) -> list[dict[str, str]]:
    tiles = []
    for name, result in results.get("tasks", {}).items():
        row = rate_rows(result)[0]
        several = len(results["tasks"]) > 1
        tiles.append(
            {
                "label": f"Right answers, {name}" if several else "Right answers",
                "value": percent(row.accuracy),
                "note": f"95 % interval {interval(row.low, row.high)}",
                "kind": "main",
            }
        )
        if row.shuffled is not None:
            tiles.append(
                {
                    "label": "Same, pictures shuffled",
                    "value": percent(row.shuffled),
                    "note": "what needs no seeing",
                }
            )
    for log in logs:
        note = f"from {log.first_loss:.2f} in {log.steps} steps"
        tiles.append({"label": f"Loss, {log.label}", "value": f"{log.last_loss:.3f}", "note": note})
    return tiles


def _benchmarks(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A bar for each task and lines for published figures, where there are several tasks or such figures."""
    tasks = results.get("tasks", {})
    found = [(headline_row(name, result), result) for name, result in tasks.items()]
    rows = [(row, result) for row, result in found if row is not None]
    if len(rows) < 2 and not any(row.references for row, _ in rows):
        return []

    def at(value: float | None, scale: float) -> float | None:
        return None if value is None else round(min(100.0, max(0.0, 100 * value / scale)), 2)

    return [
        {
            "task": row.task,
            "metric": row.metric,
            "value": figure(row.value, row.unit),
            "width": at(row.value, row.scale),
            "references": [
                {"model": model, "value": f"{value:g}", "at": at(value, row.scale)}
                for model, value in row.references
            ],
            "shuffled": None if row.shuffled is None else figure(row.shuffled, row.unit),
            "shuffled_at": at(row.shuffled, row.scale),
            "questions": result["counts"]["asked"],
        }
        for row, result in rows
    ]


def _fingerprint_note(results: Mapping[str, Any]) -> str:
    """Which weights were asked."""
    model = results.get("model", {})
    if "fingerprint" not in model:
        return ""
    return f"Weights {model['fingerprint']} ({model.get('dtype', '')}) of {results.get('checkpoint', '')}"


def _chart(log: RunLog) -> dict[str, Any]:
    points = [(float(line["step"]), float(line["loss"])) for line in log.lines]
    label = f"Loss of {log.label} over {log.steps} steps, from {log.first_loss:.3f} to {log.last_loss:.3f}"
    note = f"{log.first_loss:.3f} → {log.last_loss:.3f}"
    return {"label": log.label, "svg": chart(loss_series(points), label=label, x="step"), "note": note}


def _times(
    logs: Sequence[RunLog], results: Mapping[str, Any], extra: Sequence[tuple[str, float]]
) -> list[dict[str, str]]:
    rows = list(extra)
    rows += [(f"{log.label}, {log.steps} steps", log.seconds) for log in logs]
    for name, result in results.get("tasks", {}).items():
        rows.append((f"{name}, {result['counts']['asked']} questions", result.get("seconds") or 0.0))
        if "shuffled" in result:
            rows.append((f"{name}, pictures shuffled", result["shuffled"].get("seconds") or 0.0))
    total = sum(seconds for _, seconds in rows)
    views = [
        {"what": what, "time": duration(seconds), "share": percent(seconds / total, 0)}
        for what, seconds in rows
        if total
    ]
    return [*views, {"what": "total", "time": duration(total), "share": ""}] if views else []


def _settings(
    logs: Sequence[RunLog], results: Mapping[str, Any], extra: Mapping[str, str]
) -> list[tuple[str, list[str]]]:
    """Rows of a label and one value for each stage, or a single value for all."""
    rows: list[tuple[str, list[str]]] = [(label, [str(value)]) for label, value in extra.items()]
    model = results.get("model", {})
    if model:
        counts = {part.replace("_", " "): f"{count:,}" for part, count in model.get("parameters", {}).items()}
        rows.append(("Parameters", [", ".join(f"{part} {count}" for part, count in counts.items())]))
        rows.append(("Visual tokens a picture", [str(model.get("image_tokens", "–"))]))
        if "checkpoint" in results:
            rows.append(("Checkpoint asked", [str(results["checkpoint"])]))
    for label, keys in SETTINGS:
        values = [", ".join(filter(None, (_setting(log.config, key) for key in keys))) for log in logs]
        if any(values):
            rows.append((label, [v or "–" for v in values] if len(set(values)) > 1 else values[:1]))
    return rows


def _setting(config: Mapping[str, Any], key: str) -> str:
    value: Any = config
    for word in key.split("."):
        value = value.get(word) if isinstance(value, Mapping) else None
    if value is None or value == {} or value == []:
        return ""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _gallery(samples: Sequence[Shown]) -> list[tuple[str, list[Shown], str]]:
    """One group for each kind of question, in the order in which they come, and how many of it are right."""
    groups: dict[str, list[Shown]] = {}
    for sample in samples:
        groups.setdefault(sample.category, []).append(sample)
    return [(name or "answers", shown, _verdicts(shown)) for name, shown in groups.items()]


def _verdicts(shown: Sequence[Shown]) -> str:
    """How many of the answers shown are wrong, right, or not known to be either."""
    wrong, right = (sum(one.right is verdict for one in shown) for verdict in (False, True))
    if wrong + right == 0:
        return f"{len(shown)} shown; only the benchmark's server knows which are right"
    return f"{wrong} wrong and {right} right shown"


def _without(question: str, suffix: str) -> str:
    """The question with the instruction that the page quotes once replaced by a dagger."""
    shorter = question.removesuffix(f"\n{suffix}") if suffix else question
    return question if shorter == question else f"{shorter} †"
