"""Two or more evaluations compared question by question.

Runs answer the same questions, so their difference is measured far more sharply than either figure: intervals
come from resampling questions together with what both runs earned (`vlmamba.evaluation.bootstrap`): of the task's own
headline (mean F1, points, circular accuracy) and of mean credit for every kind of question. Questions that are scored
together are resampled together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vlmamba.common.files import read_json
from vlmamba.errors import ConfigError, DataError, MissingFileError
from vlmamba.evaluation.bootstrap import difference_interval
from vlmamba.evaluation.cli import RESULTS_FILE, reload_task
from vlmamba.evaluation.records import read_records, record_key
from vlmamba.evaluation.scorers import Headline
from vlmamba.evaluation.scoring import Credit, read_credits
from vlmamba.evaluation.tables import figure, percent, text_table
from vlmamba.evaluation.task import Sample

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
    results = [read_json(folder / RESULTS_FILE, error=DataError) for folder in folders]
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
        of_task = [result["tasks"][name] for result in results]
        task = reload_task(of_task[0])
        read = [_Answers.read(folder, result) for folder, result in zip(folders, of_task, strict=True)]
        keys = _asked(name, of_task, read, labels, common=common)
        samples = [sample for sample in task.samples if sample.key in keys]
        compared += [_compare(samples, (read[0], read[at]), labels[at], seed) for at in range(1, len(runs))]
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


class _Answers(NamedTuple):
    """A run's result, what it said, and what that earned."""

    result: dict[str, Any]
    texts: dict[tuple[str, str], str]
    credits_: dict[tuple[str, str], Credit]

    @classmethod
    def read(cls, folder: Path, result: dict[str, Any]) -> _Answers:
        file = folder / result["predictions"]
        texts = {record_key(record): str(record["text"]) for record in read_records(file)}
        return cls(result, texts, read_credits(file))

    def headline(self, keys: Sequence[tuple[str, str]]) -> float | None:
        """Of some of the questions; None where it is no function of sums over them."""
        if len(keys) == len(self.credits_):
            value: float | None = self.result["headline"]["value"]
            return value
        formula = self.result["formula"]
        return Headline([self.credits_[key].adds for key in keys], formula).value() if formula else None


def _compare(
    samples: Sequence[Sample], answers: tuple[_Answers, _Answers], label: str, seed: int
) -> TaskComparison:
    first, other = answers
    keys = [sample.key for sample in samples]
    pairs = [(first.credits_[key], other.credits_[key]) for key in keys]
    texts = [(first.texts.get(key, ""), other.texts.get(key, "")) for key in keys]
    rows: list[Difference] = []
    interval = None
    if all(credit.credit is not None for credit, _ in pairs):
        kinds: dict[str, list[tuple[Credit, Credit]]] = {"overall": pairs}
        for pair in pairs:
            if pair[0].category:
                kinds.setdefault(pair[0].category, []).append(pair)
        rows = [_row(kind, kinds[kind], seed) for kind in ("overall", *sorted(kinds.keys() - {"overall"}))]
    main, formula = first.result["headline"], first.result["formula"]
    if formula is not None and formula == other.result["formula"]:
        adds = [[credit.adds for credit in run] for run in zip(*pairs, strict=True)]
        interval = difference_interval(
            adds[0], adds[1], formula, [credit.group for credit, _ in pairs], seed=seed
        )
    settings = [answer.result.get("settings", {}) for answer in answers]
    return TaskComparison(
        first.result["task"],
        label,
        main["name"],
        first.headline(keys),
        other.headline(keys),
        main["unit"],
        interval,
        rows,
        [
            Flip(sample, *said, (b.credit or 0) - (a.credit or 0))
            for sample, said, (a, b) in zip(samples, texts, pairs, strict=True)
            if a.credit != b.credit
        ],
        sum(a != b for a, b in texts),
        {
            key: (settings[0].get(key), settings[1].get(key))
            for key in DESCRIBING
            if settings[0].get(key) != settings[1].get(key)
        },
    )


def _row(name: str, pairs: Sequence[tuple[Credit, Credit]], seed: int) -> Difference:
    first, other = ([float(credit.credit or 0) for credit in run] for run in zip(*pairs, strict=True))
    changes = [b - a for a, b in zip(first, other, strict=True)]
    groups = [credit.group for credit, _ in pairs]
    low, high = difference_interval(
        Headline.share(first).rows, Headline.share(other).rows, groups=groups, seed=seed
    )
    return Difference(
        name,
        len(pairs),
        sum(first) / len(pairs),
        sum(other) / len(pairs),
        sum(changes) / len(pairs),
        low / 100,
        high / 100,
        sum(change > 0 for change in changes),
        sum(change < 0 for change in changes),
    )


def _asked(
    task: str, results: Sequence[Any], answers: Sequence[_Answers], labels: Sequence[str], *, common: bool
) -> set[tuple[str, str]]:
    """Keys of the questions that all of the runs were asked.

    Raises:
        DataError: The data differ, or the numbers do and `common` is not set.
    """
    data = [result.get("settings", {}).get("data") for result in results]
    for label, fingerprint in zip(labels, data, strict=True):
        if fingerprint != data[0]:
            raise DataError(
                f"{task}: {labels[0]} and {label} were asked other questions (data {data[0]} and {fingerprint})"
            )
    counts = [len(answer.credits_) for answer in answers]
    if len(set(counts)) > 1 and not common:
        numbers = ", ".join(f"{label}: {count}" for label, count in zip(labels, counts, strict=True))
        raise DataError(
            f"{task}: the runs were asked different numbers of questions ({numbers}). Ask the rest, or compare those "
            "that all were asked with --common"
        )
    return set.intersection(*(set(answer.credits_) for answer in answers))


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
