"""Two or more evaluations compared question by question.

Runs answer the same questions, so their difference is measured far more sharply than either figure: intervals
come from resampling questions together with what both runs earned (`vlmamba.evaluation.bootstrap`): of the task's own
headline (mean F1, points, circular accuracy) and of mean credit for every kind of question. Questions that are scored
together are resampled together.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlmamba.errors import ConfigError, DataError, MissingFileError
from vlmamba.evaluation.bootstrap import headline_interval, paired_interval
from vlmamba.evaluation.cli import RESULTS_FILE, reload_task
from vlmamba.evaluation.records import read_records, record_key
from vlmamba.evaluation.scorers import Score
from vlmamba.evaluation.scoring import headline, score_answers
from vlmamba.evaluation.tables import figure, percent, text_table
from vlmamba.evaluation.task import Sample, Task, first_questions

DESCRIBING = ("model", "dtype", "method", "rank_by", "max_new_tokens", "processor")
"""Settings that may differ between runs and then are shown."""


@dataclass(frozen=True)
class Difference:
    """One row: mean credit of the first run, of the other, and their difference in 0..1 with its interval.

    Attributes:
        gained, lost: Questions on which the other run earns more, and less.
    """

    name: str
    questions: int
    first: float
    other: float
    difference: float
    low: float
    high: float
    gained: int
    lost: int


@dataclass(frozen=True)
class Flip:
    """A question on which two runs earn different credit."""

    sample: Sample
    first: str
    other: str
    change: float
    """Credit of the other run less that of the first."""


@dataclass(frozen=True)
class TaskComparison:
    """One task in two runs.

    Attributes:
        unit: Of the headlines, which are the task's own figure (F1, points, ...).
        interval: 95 % interval of the headlines' difference, in their unit; None where it cannot be had (an area
            under a curve, or no headline).
        rows: Overall first, then every kind of question; empty where only a server knows what is right.
        changed: Answers whose text differs.
        settings: Settings that differ: name -> (first, other).
    """

    task: str
    other: str
    headline: str
    first_value: float | None
    other_value: float | None
    unit: str
    interval: tuple[float, float] | None
    rows: Sequence[Difference]
    flips: Sequence[Flip]
    changed: int
    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """All of a comparison; the first of `runs` is what the others are compared with."""

    runs: Sequence[str]
    tasks: Sequence[TaskComparison]
    left_out: Sequence[str]
    """Tasks that not all of the runs have."""

    def figures(self) -> dict[str, Any]:
        """Everything but the flips' texts and pictures, JSON-able."""
        tasks = []
        for task in self.tasks:
            fields = {k: v for k, v in vars(task).items() if k not in ("rows", "flips")}
            ids = {
                True: [f for f in task.flips if f.change > 0],
                False: [f for f in task.flips if f.change < 0],
            }
            rows = [asdict(row) for row in task.rows]
            flips = {
                "gained": [f.sample.question_id for f in ids[True]],
                "lost": [f.sample.question_id for f in ids[False]],
            }
            tasks.append({**fields, "rows": rows, "flips": flips})
        return {"runs": list(self.runs), "tasks": tasks, "left_out": list(self.left_out)}


def compare_runs(
    runs: Sequence[str | Path], *, tasks: Sequence[str] | None = None, common: bool = False, seed: int = 0
) -> Comparison:
    """Compare evaluations with the first of them.

    Args:
        runs: Folders that `vlmamba.evaluation.cli.evaluate_checkpoint` wrote, or runs that hold one.
        tasks: Only these; all that the runs have in common when left out.
        common: Where runs were asked different numbers of questions, compare those that all were asked.
        seed: Of the resampling.

    Raises:
        ConfigError: Fewer than two runs, or no common task.
        MissingFileError: A run has no results.
        DataError: Runs were asked other questions.
    """
    if len(runs) < 2:
        raise ConfigError(f"a comparison needs at least two runs, got {len(runs)}")
    folders = [_results_folder(Path(run)) for run in runs]
    results = [json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8")) for folder in folders]
    labels = _labels([str(run) for run in runs])
    held = [list(result["tasks"]) for result in results]
    shared = [name for name in held[0] if all(name in names for names in held[1:])]
    chosen = shared if tasks is None else list(tasks)
    absent = [name for name in chosen if name not in shared]
    if absent or not chosen:
        has = "; ".join(
            f"{label} has {', '.join(names) or 'none'}" for label, names in zip(labels, held, strict=True)
        )
        raise ConfigError(f"the runs have no common task {' or '.join(map(repr, absent)) or 'at all'}: {has}")
    compared = []
    for name in chosen:
        task = reload_task(results[0]["tasks"][name])
        of_task = [result["tasks"][name] for result in results]
        samples = _asked(task, of_task, labels, common=common)
        answers = [
            _Answers.read(task, samples, folder, r) for folder, r in zip(folders, of_task, strict=True)
        ]
        for at in range(1, len(runs)):
            compared.append(
                _compare(
                    task, samples, (of_task[0], of_task[at]), (answers[0], answers[at]), labels[at], seed
                )
            )
    left_out = sorted({name for names in held for name in names} - set(shared))
    return Comparison(labels, compared, left_out)


def format_comparison(comparison: Comparison) -> str:
    """Text tables for a terminal."""
    parts = [f"compared with {comparison.runs[0]}"]
    for task in comparison.tasks:
        values = " -> ".join(figure(value, task.unit) for value in (task.first_value, task.other_value))
        lines = [f"{task.task}, {task.other}: {task.headline} {values}{headline_difference(task)}"]
        if task.rows:
            header = [
                "kind of question",
                "first",
                "other",
                "difference",
                "95 % interval",
                "gained",
                "lost",
                "questions",
            ]
            cells = [
                [
                    row.name,
                    percent(row.first),
                    percent(row.other),
                    points(row.difference),
                    f"{points(row.low)} to {points(row.high)}",
                    str(row.gained),
                    str(row.lost),
                    str(row.questions),
                ]
                for row in task.rows
            ]
            lines.append(text_table(header, cells))
        else:
            lines.append("only the benchmark's server knows which answers are right")
        lines.append(f"{task.changed} answer(s) with another text")
        lines += [f"{name}: {first} / {other}" for name, (first, other) in task.settings.items()]
        parts.append("\n".join(lines))
    if comparison.left_out:
        parts.append(f"not in all of the runs: {', '.join(comparison.left_out)}")
    return "\n\n".join(parts)


def headline_difference(task: TaskComparison) -> str:
    """The difference of two headlines with its interval, in words; nothing where there is no interval."""
    if task.interval is None or task.first_value is None or task.other_value is None:
        return ""
    low, high = task.interval
    return f" ({task.other_value - task.first_value:+.2f}, 95 % interval {low:+.2f} to {high:+.2f})"


def points(share: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * share:+.2f}"


@dataclass(frozen=True)
class _Answers:
    """What a run said to the questions compared, and what it earned."""

    texts: Sequence[str | None]
    score: Score

    @classmethod
    def read(cls, task: Task, samples: Sequence[Sample], folder: Path, result: Any) -> _Answers:
        records = {record_key(record): record for record in read_records(folder / result["predictions"])}
        found = [records.get(sample.key) for sample in samples]
        texts = [None if record is None else str(record["text"]) for record in found]
        return cls(texts, score_answers(task, samples, records))


def _compare(
    task: Task,
    samples: Sequence[Sample],
    results: tuple[Any, Any],
    answers: tuple[_Answers, _Answers],
    label: str,
    seed: int,
) -> TaskComparison:
    first, other = answers
    changes: list[float] = []
    rows: list[Difference] = []
    interval = None
    if first.score.correct:
        credits_ = [
            (float(a), float(b)) for a, b in zip(first.score.correct, other.score.correct, strict=True)
        ]
        changes = [b - a for a, b in credits_]
        groups = first.score.groups or [
            at if sample.group is None else ("group", sample.group) for at, sample in enumerate(samples)
        ]
        interval = headline_interval(first.score, other.score, groups, seed=seed)
        kinds: dict[str, list[int]] = {"overall": list(range(len(samples)))}
        for at, sample in enumerate(samples):
            if sample.category:
                kinds.setdefault(f"{sample.category}", []).append(at)
        rows = [
            _row(kind, [credits_[i] for i in at], [groups[i] for i in at], seed) for kind, at in kinds.items()
        ]
        rows[1:] = sorted(rows[1:], key=lambda row: row.name)
    texts = list(zip(first.texts, other.texts, strict=True))
    flips = [
        Flip(samples[at], texts[at][0] or "", texts[at][1] or "", change)
        for at, change in enumerate(changes)
        if change
    ]
    headlines = [headline(task, answer.score.metrics) for answer in answers]
    settings = [result.get("settings", {}) for result in results]
    return TaskComparison(
        task.name,
        label,
        headlines[0]["name"],
        headlines[0]["value"],
        headlines[1]["value"],
        headlines[0]["unit"],
        interval,
        rows,
        flips,
        sum(a != b for a, b in texts),
        {
            key: (settings[0].get(key), settings[1].get(key))
            for key in DESCRIBING
            if settings[0].get(key) != settings[1].get(key)
        },
    )


def _row(
    name: str, credits_: Sequence[tuple[float, float]], groups: Sequence[Hashable], seed: int
) -> Difference:
    changes = [other - first for first, other in credits_]
    count = len(credits_)
    low, high = paired_interval(changes, groups, seed=seed)
    return Difference(
        name,
        count,
        sum(first for first, _ in credits_) / count,
        sum(other for _, other in credits_) / count,
        sum(changes) / count,
        low,
        high,
        sum(change > 0 for change in changes),
        sum(change < 0 for change in changes),
    )


def _asked(task: Task, results: Sequence[Any], labels: Sequence[str], *, common: bool) -> list[Sample]:
    """The questions that all of the runs were asked.

    Raises:
        DataError: The data differ, or the numbers do and `common` is not set.
    """
    data = [result.get("settings", {}).get("data") for result in results]
    for label, fingerprint in zip(labels, data, strict=True):
        if fingerprint != data[0]:
            raise DataError(
                f"{task.name}: {labels[0]} and {label} were asked other questions (data {data[0]} and {fingerprint})"
            )
    limits = [result["settings"].get("limit") or len(task.samples) for result in results]
    if len(set(limits)) > 1 and not common:
        numbers = ", ".join(f"{label}: {limit}" for label, limit in zip(labels, limits, strict=True))
        raise DataError(
            f"{task.name}: the runs were asked different numbers of questions ({numbers}). Ask the rest, or compare "
            "those that all were asked with --common"
        )
    return first_questions(task.samples, min(limits))


def _results_folder(run: Path) -> Path:
    for folder in (run, run / "eval", run.parent):
        if (folder / RESULTS_FILE).is_file() and (folder != run.parent or run.name == RESULTS_FILE):
            return folder
    raise MissingFileError(
        f"no results in {run}: neither {run}/{RESULTS_FILE} nor {run}/eval/{RESULTS_FILE} is there. Write them with: "
        f"vlmamba eval {run} --tasks ..."
    )


def _labels(names: Sequence[str]) -> list[str]:
    """Names of runs; a second one of the same name is numbered."""
    seen: dict[str, int] = defaultdict(int)
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return labels
