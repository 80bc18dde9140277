"""A table's report: Markdown and HTML with our figures and the paper's, plots, and what reproduces each cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from vlmamba.ablations.collect import RowResult
from vlmamba.ablations.execute import Store
from vlmamba.ablations.graph import Graph
from vlmamba.ablations.plots import draw_all
from vlmamba.ablations.table import Table
from vlmamba.ablations.tables import MARK, figure_text, state_text
from vlmamba.common.files import replace_json
from vlmamba.evaluation.tables import duration
from vlmamba.pages import write_page
from vlmamba.pages.charts import write_chart

COSTS = (
    "Seconds a step are those of stage 2 (median of the log, of the seed disturbed least); speed and memory of "
    "inference are of one question about one picture, measured alone."
)


def write_report(
    table: Table,
    results: Sequence[RowResult],
    graph: Graph,
    store: Store,
    folder: str | Path,
    *,
    name: str,
    command: str,
) -> Path:
    """Write ``NAME.md``, ``NAME.html``, ``NAME.json`` and the plots in ``NAME/``.

    Args:
        table: With its columns written out.
        results: `vlmamba.ablations.collect.collect`'s.
        graph: The runs.
        store: Their results.
        folder: Where to.
        name: Of the files.
        command: That made it.

    Returns:
        The HTML page.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    plots = draw_all(table, results)
    for plot in plots:
        write_chart(target / name / f"{plot.name}.svg", plot.svg)
    about = facts(table, results, graph, store, command)
    found = {
        "table": table,
        "name": name,
        "about": about,
        "mark": MARK,
        "costs_note": COSTS,
        "problems": [(r.row.name, label, log, _tail(log)) for r in results for label, log in r.problems],
        "plots": [{"label": "", "note": plot.caption, "svg": plot.svg, "file": plot.name} for plot in plots],
        "ours": ours(table, results),
        "costs": costs(results),
        "paper": papers(table, results),
        "order": order(table, results),
        "cells": cells(results, graph, store),
    }
    replace_json(target / f"{name}.json", _figures(table, results, about), indent=1)
    write_page(target / f"{name}.md", "ablation.md", title=table.title, **found)
    return write_page(target / f"{name}.html", "ablation.html", title=table.title, **found)


def facts(
    table: Table, results: Sequence[RowResult], graph: Graph, store: Store, command: str
) -> list[tuple[str, str]]:
    """What a reader of the figures must know."""
    seeds = sorted({seed for _, seed in graph.cells})
    outcomes = [o for node in graph.nodes if (o := store.outcome(node)) is not None]
    trained = [o.seconds for o in outcomes if o.id.startswith("train-")]
    beside = max((o.beside for o in outcomes if o.id.startswith("train-")), default=0)
    commits = sorted({o.commit for o in outcomes if o.commit})
    devices = {f"{r.speed['device']}, {r.speed['threads']} thread(s)" for r in results if r.speed}
    rows = [
        ("Command", command),
        ("Seeds", ", ".join(map(str, seeds))),
        ("Settings of all rows", ", ".join(f"{k} {v}" for k, v in table.settings.items()) or "the recipe's"),
        ("Compared with", table.compared_with),
        ("Source of the paper's figures", table.source or "none"),
        ("Trainings", f"{len(trained)}, {duration(sum(trained))} in all; at most {beside + 1} at a time"),
        ("Speed measured on", ", ".join(sorted(devices)) or "not measured"),
        ("Commit", ", ".join(commits) or "unknown"),
    ]
    if len(commits) > 1:
        text = "the runs are not all of one commit (see each cell); the code between may have changed figures"
        rows.append(("Mind", text))
    if any(commit.endswith("-dirty") for commit in commits):
        rows.append(("Mind also", "-dirty: files differed from the commit"))
    if len(seeds) == 1:
        rows.append(("Intervals", "of questions only: one seed says nothing about other seeds"))
    return rows


def ours(table: Table, results: Sequence[RowResult]) -> list[list[str]]:
    """Header and rows of the scores measured here."""
    columns = [c for c in table.columns if any(c in r.figures for r in results)]
    units = {c: next(r.figures[c].unit for r in results if c in r.figures) for c in columns}
    header = ["row", *(f"{c.rpartition('/')[2]} ({units[c]})" for c in columns), "state"]
    rows = [
        [r.row.name, *(figure_text(r.figures.get(c), "±") for c in columns), state_text(r)] for r in results
    ]
    return [header, *rows]


def costs(results: Sequence[RowResult]) -> list[list[str]]:
    """Header and rows of what each row costs."""
    header = [
        "row", "connector, parameters", "visual tokens", "training, s/step", "training, GiB", "encoder + connector, ms",
        "prefill, ms", "decode, tokens/s", "inference, GiB",
    ]  # fmt: skip
    rows = [header]
    for result in results:
        speed = result.speed
        rows.append([
            result.row.name,
            _number(result.parameters.get("multi_modal_projector"), ",d"), _number(result.image_tokens, "d"),
            _number(result.step_seconds, ".3f"), _number(result.memory_gib, ".2f"),
            _number(speed.get("connector_ms"), ".1f"), _number(speed.get("prefill_ms"), ".1f"),
            _number(speed.get("decode_tokens_per_s"), ".0f"), _number(speed.get("memory_gib"), ".2f"),
        ])  # fmt: skip
    return rows


def papers(table: Table, results: Sequence[RowResult]) -> list[list[str]]:
    """Header and rows of the paper's own figures; empty where there are none."""
    columns = table.paper_columns
    if not columns:
        return []
    found = [[r.row.name, *(_number(r.row.paper.get(c), "g") for c in columns)] for r in results]
    return [["row", *columns], *(row for row in found if any(cell != "–" for cell in row[1:]))]


def order(table: Table, results: Sequence[RowResult]) -> list[str]:
    """Sentences on whether our order of rows is the paper's: each row against the baseline and the row before it."""
    main = table.columns[0]
    both = [r for r in results if main in r.figures and r.row.paper]
    lines = []
    pairs = [(a, b) for a, b in combinations(both, 2) if a.row.name == table.compared_with]
    pairs += [(a, b) for a, b in pairwise(both) if (a, b) not in pairs]
    for first, second in pairs:
        shared = [c for c in table.paper_columns if c in first.row.paper and c in second.row.paper]
        shared = [c for c in shared if "/" not in c]  # "s/iteration" is a cost
        if not shared:
            continue
        gains = [second.row.paper[c] - first.row.paper[c] for c in shared]
        better = sum(gain > 0 for gain in gains)
        change = second.figures[main].estimate.mean - first.figures[main].estimate.mean
        lines.append(
            f"{second.row.name} against {first.row.name}: in the paper better on {better} of {len(shared)} benchmarks "
            f"({sum(gains) / len(gains):+.2f} on average); here {change:+.2f} on {main}"
        )
    return lines


def cells(results: Sequence[RowResult], graph: Graph, store: Store) -> list[dict[str, Any]]:
    """What reproduces each row and seed."""
    found = []
    for result in results:
        for seed, cell in sorted(result.cells.items()):
            nodes = [n for n in (*cell.train, cell.evaluation, cell.speed) if n is not None]
            found.append({
                "row": result.row.name,
                "seed": seed,
                "values": {c: f.values for c, f in result.figures.items()},
                "model": result.models.get(seed, "–"),
                "commands": [*cell.commands, *_evaluation(graph, cell.evaluation)],
                "starts": dict(result.row.parts),
                "nodes": nodes,
                "commits": sorted({o.commit for n in nodes if (o := store.outcome(n)) and o.commit}),
            })  # fmt: skip
    return found


def _evaluation(graph: Graph, node_id: str | None) -> list[str]:
    return [] if node_id is None else ["vlmamba " + " ".join(graph.nodes[node_id].words)]


def _figures(table: Table, results: Sequence[RowResult], about: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """All figures, JSON-able."""
    rows = []
    for result in results:
        rows.append({
            "row": result.row.name,
            "figures": {c: dataclasses.asdict(f) for c, f in result.figures.items()},
            "paper": dict(result.row.paper),
            "parameters": dict(result.parameters),
            "image_tokens": result.image_tokens,
            "step_seconds": result.step_seconds,
            "memory_gib": result.memory_gib,
            "speed": dict(result.speed),
            "models": result.models,
            "problems": result.problems,
        })  # fmt: skip
    return {"title": table.title, "baseline": table.compared_with, "about": dict(about), "rows": rows}


def _number(value: Any, form: str) -> str:
    return "–" if value is None else format(value, form)


def _tail(log: str, count: int = 20) -> str:
    file = Path(log)
    if not file.is_file():
        return ""
    return "\n".join(file.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])
