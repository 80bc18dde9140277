"""What a table's runs have measured, row by row."""

from __future__ import annotations

import dataclasses
import statistics as median_of
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmamba.ablations.execute import Store
from vlmamba.ablations.graph import Cell, Graph
from vlmamba.ablations.statistics import Estimate, difference, estimate, holm
from vlmamba.ablations.table import Row, Table
from vlmamba.common.files import read_json
from vlmamba.errors import DataError
from vlmamba.evaluation.cli import RESULTS_FILE
from vlmamba.evaluation.scoring import read_credits
from vlmamba.evaluation.tables import RunLog, read_run
from vlmamba.evaluation.task import load_task


@dataclass(frozen=True)
class Measured:
    """One column of one row and seed.

    Attributes:
        value: In the column's unit.
        credits_: Of each question, where the value is their mean.
        groups: Questions of equal value are about the same picture.
    """

    value: float
    unit: str
    credits_: Sequence[float] = ()
    groups: Sequence[Hashable] = ()


@dataclass(frozen=True)
class Figure:
    """One cell of the report.

    Attributes:
        values: Of each seed that is there.
        change: Less the baseline; None for the baseline itself and where either is missing.
        significant: Whether the change would be one with other seeds and questions, too: 95 %, over all rows of the
            column (Holm).
    """

    values: Sequence[float]
    unit: str
    estimate: Estimate
    change: Estimate | None = None
    significant: bool = False


@dataclass
class RowResult:
    """One line of the report.

    Attributes:
        figures: By column.
        problems: Nodes that failed, or wait for one that did: (label, log).
        open: Nodes that have not run yet.
        parameters: Of each part of the model.
        step_seconds: Of the last stage of training: median of the log's windows, of the seed that was disturbed least.
        memory_gib: The most that training held.
        logs: Logs of each stage and seed.
        commands: By seed, what trains the same without a table.
    """

    row: Row
    figures: dict[str, Figure] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)
    open: int = 0
    parameters: Mapping[str, int] = field(default_factory=dict)
    image_tokens: int | None = None
    step_seconds: float | None = None
    memory_gib: float | None = None
    speed: Mapping[str, Any] = field(default_factory=dict)
    logs: dict[str, list[RunLog]] = field(default_factory=dict)
    cells: dict[int, Cell] = field(default_factory=dict)
    models: dict[int, str] = field(default_factory=dict)


def with_kinds(table: Table) -> Table:
    """The table with a column for each kind of question where it asks for all (``playground/*``)."""
    columns: list[str] = []
    for column in table.columns:
        name, _, kind = column.partition("/")
        kinds = (
            dict.fromkeys(s.category for s in load_task(name, folder=table.folder).samples if s.category)
            if kind == "*"
            else ()
        )
        columns += [f"{name}/{each}" for each in kinds] if kind == "*" else [column]
    return dataclasses.replace(table, columns=tuple(columns))


def collect(table: Table, graph: Graph, store: Store) -> list[RowResult]:
    """Gather what is there of a table; what is not is left out and named.

    Args:
        table: With its columns written out (`with_kinds`).
        graph: Its runs.
        store: Their results.
    """
    measured: dict[tuple[str, int, str], Measured] = {}
    results = []
    for row in table.shown:
        cells = {seed: cell for (name, seed), cell in graph.cells.items() if name == row.name}
        if not cells:
            continue
        result = RowResult(row, cells=cells)
        for seed, cell in cells.items():
            _state(result, cell, graph, store)
            if cell.evaluation is None or store.outcome(cell.evaluation) is None:
                continue
            results_file = store.result(cell.evaluation) / RESULTS_FILE
            if not results_file.is_file():
                result.open += 1
                continue
            found = read_json(results_file, error=DataError)
            result.parameters = found["model"]["parameters"]
            result.image_tokens = found["model"]["image_tokens"]
            result.models[seed] = found["model"]["fingerprint"]
            for column in table.columns:
                measured[row.name, seed, column] = _measure(column, found, results_file.parent)
        _training(result, graph, store)
        results.append(result)
    _figures(table, results, measured)
    return results


def _state(result: RowResult, cell: Cell, graph: Graph, store: Store) -> None:
    for node_id in (*cell.train, cell.evaluation, cell.speed):
        if node_id is None or store.outcome(node_id) is not None:
            continue
        if store.failure(node_id) is not None:
            result.problems.append((graph.nodes[node_id].label, str(store.log(node_id))))
        else:
            result.open += 1


def _training(result: RowResult, graph: Graph, store: Store) -> None:
    """Losses, seconds a step and memory from the logs; speed of the trained model."""
    steps, memory = [], []
    for cell in result.cells.values():
        for at, node_id in enumerate(cell.train):
            if store.outcome(node_id) is None or not store.result(node_id).exists():
                continue
            run = read_run(store.result(node_id))
            result.logs.setdefault(f"stage {at + 1}" if len(cell.train) > 1 else "training", []).append(run)
            memory.append(max(float(line.get("memory_gib") or 0.0) for line in run.lines))
            if node_id == cell.train[-1]:
                steps.append(seconds_per_step(run))
        if cell.speed is not None and store.result(cell.speed).is_file():
            result.speed = read_json(store.result(cell.speed), error=DataError)
    result.step_seconds = min(steps, default=None)
    result.memory_gib = max(memory, default=None)


def seconds_per_step(run: RunLog) -> float:
    """Median over the log's windows, so that a pause does not count."""
    windows = [
        float(line["seconds"]) / (line["step"] - before["step"])
        for before, line in zip(run.lines, run.lines[1:], strict=False)
        if line.get("seconds")
    ]
    return median_of.median(windows) if windows else run.seconds / run.steps


def _measure(column: str, results: Mapping[str, Any], folder: Path) -> Measured:
    """One column of an evaluation.

    Raises:
        DataError: The task has no such kind of question, or only a server can score it.
    """
    name, _, kind = column.partition("/")
    result = next((r for r in results["tasks"].values() if r["spec"] == name), None)
    if result is None:
        raise DataError(f"column {column!r}: {folder / RESULTS_FILE} has no result of {name!r}")
    credits_ = list(read_credits(folder / result["predictions"]).values())
    chosen = [c for c in credits_ if not kind or c.category == kind]
    if not chosen:
        known = sorted({c.category for c in credits_ if c.category})
        raise DataError(
            f"column {column!r}: {name} has no questions of kind {kind!r}; it has {', '.join(known)}"
        )
    value, unit, earned = result["headline"]["value"], result["headline"]["unit"], [c.credit for c in chosen]
    if (value is None and not kind) or None in earned:
        raise DataError(f"{column}: only the benchmark's server can score it, so it cannot be a column")
    part = [float(credit or 0) for credit in earned]
    groups = [c.group for c in chosen]
    return (
        Measured(100 * sum(part) / len(part), "%", part, groups)
        if kind
        else Measured(value, unit, part, groups)
    )


def _figures(
    table: Table, results: Sequence[RowResult], measured: Mapping[tuple[str, int, str], Measured]
) -> None:
    """Means with intervals, changes against the baseline, and which of these are significant."""
    trained = {
        r.row.name: [
            cell.train for seed, cell in r.cells.items() if (r.row.name, seed, table.columns[0]) in measured
        ]
        for r in results
    }
    for column in table.columns:
        of_rows = {
            r.row.name: [m for seed in r.cells if (m := measured.get((r.row.name, seed, column))) is not None]
            for r in results
        }
        base = of_rows.get(table.compared_with, [])
        changes: list[tuple[RowResult, Estimate | None]] = []
        for result in results:
            own = of_rows[result.row.name]
            changed = None
            if own and base and result.row.name != table.compared_with:
                changed = difference(
                    [m.value for m in own], [m.value for m in base],
                    [m.credits_ for m in own], [m.credits_ for m in base], own[0].groups,
                    same_models=trained[result.row.name] == trained[table.compared_with],
                )  # fmt: skip
            changes.append((result, changed))
        rejected = holm([None if change is None else change.p for _, change in changes])
        for (result, change), significant in zip(changes, rejected, strict=True):
            own = of_rows[result.row.name]
            if own:
                mean = estimate([m.value for m in own], [m.credits_ for m in own], own[0].groups)
                values = [m.value for m in own]
                result.figures[column] = Figure(values, own[0].unit, mean, change, significant)
