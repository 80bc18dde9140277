"""The figures of a report as rows, and as plain text for a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vlmamba.errors import DataError, MissingFileError


@dataclass(frozen=True)
class RateRow:
    """Accuracy on one kind of question. Shares lie in 0..1, None where nothing was asked."""

    label: str
    total: int
    accuracy: float | None
    low: float | None
    high: float | None
    shuffled: float | None
    """With the pictures shuffled among the questions; None when that was not measured."""


@dataclass(frozen=True)
class HeadlineRow:
    """The one figure of a task, in its own unit.

    Attributes:
        task: Name of the task.
        metric: Name of the figure.
        value: None where only a server can tell.
        unit: "%", "points", ...
        scale: Where its bar ends.
        references: Published figures: (model, value).
        shuffled: The same with the pictures shuffled, None when that was not measured.
    """

    task: str
    metric: str
    value: float | None
    unit: str
    scale: float
    references: Sequence[tuple[str, float]]
    shuffled: float | None


@dataclass(frozen=True)
class RunLog:
    """What a training run left in its folder.

    Attributes:
        label: For tables and charts.
        lines: Those of ``log.jsonl`` that have a step and a finite loss.
        config: ``config.yaml``, empty when there is none.
    """

    label: str
    lines: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """The last step."""
        return int(self.lines[-1]["step"])

    @property
    def first_loss(self) -> float:
        """Loss of the first line."""
        return float(self.lines[0]["loss"])

    @property
    def last_loss(self) -> float:
        """Mean loss of the last twentieth of the lines (at most 50 lines)."""
        tail = self.lines[-max(1, min(50, len(self.lines) // 20)) :]
        return sum(float(line["loss"]) for line in tail) / len(tail)

    @property
    def seconds(self) -> float:
        """Time spent in steps."""
        return sum(float(line.get("seconds") or 0.0) for line in self.lines)


def read_run(path: str | Path, label: str | None = None) -> RunLog:
    """Read the log and the config of a run.

    Args:
        path: The run's folder.
        label: Its name in tables; that of the folder when left out.

    Raises:
        MissingFileError: There is no ``log.jsonl``.
        DataError: It has no line with a finite loss.
    """
    folder = Path(path)
    file = folder / "log.jsonl"
    if not file.is_file():
        raise MissingFileError(f"no training log {file}: give the folder of a run (runs/NAME).")
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut off by a kill
        loss = line.get("loss") if isinstance(line, dict) else None
        if isinstance(loss, int | float) and math.isfinite(loss) and "step" in line:
            lines.append(line)
    if not lines:
        raise DataError(f"{file} has no line with a step and a finite loss, so there is nothing to show.")
    config = folder / "config.yaml"
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return RunLog(label or folder.name, lines, settings if isinstance(settings, dict) else {})


def rate_rows(result: Mapping[str, Any]) -> list[RateRow]:
    """Rows of a task's result: overall first, then each category.

    Args:
        result: One value of ``results["tasks"]`` (see `vlmamba.evaluation.cli.evaluate_checkpoint`).
    """
    blind = result.get("shuffled", {}).get("metrics", {})

    def row(label: str, values: Mapping[str, Any], other: Mapping[str, Any]) -> RateRow:
        figures = {key: values.get(key) for key in ("accuracy", "low", "high")}
        return RateRow(label, values["total"], **figures, shuffled=other.get("accuracy"))

    metrics = result["metrics"]
    rows = [row("overall", metrics["overall"], blind.get("overall", {}))]
    for name, values in metrics.get("categories", {}).items():
        rows.append(row(name, values, blind.get("categories", {}).get(name, {})))
    return rows


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage; a dash for None."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def interval(low: float | None, high: float | None) -> str:
    """An interval of shares in percent."""
    return "–" if low is None or high is None else f"{100 * low:.1f} – {100 * high:.1f} %"


def duration(seconds: float) -> str:
    """A length of time in the two largest units that fit."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def counts_line(counts: Mapping[str, int]) -> str:
    """The counts of a result in one line."""
    names = {"cut": "cut off at the token limit", "resumed": ""}
    shown = [(names.get(key, key), number) for key, number in counts.items()]
    return ", ".join(f"{name} {number}" for name, number in shown if name)


SCALES = {"%": 100.0, "points": 2000.0}
"""Where bars end, by unit; points are those of MME's perception. Otherwise at the largest figure shown."""


def figure(value: float | None, unit: str) -> str:
    """A headline's value with its unit; a dash for None."""
    if value is None:
        return "–"
    return f"{value:.1f} {unit}".rstrip()


def headline_row(name: str, result: Mapping[str, Any]) -> HeadlineRow | None:
    """A task's headline beside published figures; None for results that have none."""
    found = result.get("headline")
    if not found:
        return None
    references = [(r["model"], float(r["value"])) for r in result.get("references", ())]
    blind = result.get("shuffled", {}).get("headline") or {}
    values = [v for v in (found["value"], blind.get("value"), *(v for _, v in references)) if v is not None]
    scale = SCALES.get(found["unit"]) or 1.05 * max(values, default=1.0)
    return HeadlineRow(
        name, found["name"], found["value"], found["unit"], scale, references, blind.get("value")
    )


def settings_line(settings: Mapping[str, Any]) -> str:
    """How answers were made, and fingerprints of model and data, in one line."""
    if not settings:
        return ""
    how = f"greedy, at most {settings.get('max_new_tokens')} new tokens"
    if settings.get("method") == "likelihood":
        how = f"options ranked by the {settings['rank_by']} of their tokens' log-probabilities"
    limit = f", first {settings['limit']} questions" if settings.get("limit") else ""
    batch = f", batches of {settings['batch_size']}" if "batch_size" in settings else ""
    return f"{how}{limit}{batch}, {settings.get('dtype')}; model {settings.get('model')}, data {settings.get('data')}"


def notes_of(result: Mapping[str, Any]) -> list[str]:
    """What a reader of a task's figures must know: counts, settings, variants, the submission file."""
    notes = [counts_line(result["counts"]), settings_line(result.get("settings", {}))]
    notes.append(", ".join(f"{key} {value}" for key, value in result.get("task_settings", {}).items()))
    submission = result.get("submission")
    if submission:
        notes.append(
            f"for the server: {submission['file']}"
            if submission["file"]
            else f"no file for the server: {submission['why']}"
        )
    return [note for note in notes if note]


def format_results(results: Mapping[str, Any]) -> str:
    """All tasks of a result as text tables."""
    parts = []
    for name, result in results["tasks"].items():
        header = ["kind of question", "accuracy", "95 % interval", "pictures shuffled", "questions"]
        rows = rate_rows(result)
        cells = [
            [r.label, percent(r.accuracy), interval(r.low, r.high), percent(r.shuffled), str(r.total)]
            for r in rows
        ]
        if all(r.shuffled is None for r in rows):
            header.pop(3)
            cells = [[*row[:3], row[4]] for row in cells]
        title, main = name, headline_row(name, result)
        if main is not None:
            title = f"{name}: {main.metric} {figure(main.value, main.unit)}"
            if main.references:
                title += " (" + ", ".join(f"{model} {value:g}" for model, value in main.references) + ")"
        parts.append("\n".join([title, text_table(header, cells), *notes_of(result)]))
    return "\n\n".join(parts)


def format_runs(runs: Sequence[RunLog]) -> str:
    """Steps, losses and times of training runs as a text table."""
    header = ["run", "steps", "first loss", "last loss", "time"]
    cells = [
        [r.label, str(r.steps), f"{r.first_loss:.3f}", f"{r.last_loss:.3f}", duration(r.seconds)]
        for r in runs
    ]
    return text_table(header, cells)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Columns of text: the first (or so many as `left` says) flush left, the others flush right."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[at]) for row in table) for at in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if at < left else cell.rjust(w)
            for at, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in lines)
