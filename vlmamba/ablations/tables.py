"""A table's results as text: for a terminal, and as cells for reports."""

from __future__ import annotations

from collections.abc import Sequence

from vlmamba.ablations.collect import Figure, RowResult
from vlmamba.ablations.table import Table
from vlmamba.evaluation.tables import text_table

MARK = "*"


def format_rows(table: Table, results: Sequence[RowResult]) -> str:
    """The table for a terminal."""
    columns = [c for c in table.columns if any(c in r.figures for r in results)]
    header = ["row", *columns, "tokens", "s/step", "prefill ms", "decode tok/s"]
    cells = [[r.row.name, *(figure_text(r.figures.get(c)) for c in columns), *cost_cells(r)] for r in results]
    lines = [table.title, text_table(header, cells)]
    lines.append(
        f"{MARK} differs from {table.compared_with!r} (95 %, Holm over the rows of a column); +- half of the 95 % "
        "interval over seeds and questions"
    )
    lines += [f"FAILED {label}: {log}" for r in results for label, log in r.problems]
    left = sum(r.open for r in results)
    if left:
        lines.append(f"{left} run(s) left to do")
    return "\n".join(lines)


def figure_text(figure: Figure | None, plus_minus: str = "+-") -> str:
    """Mean, half of its interval, and the mark."""
    if figure is None:
        return "–"
    text = f"{figure.estimate.mean:.1f}"
    if figure.estimate.high is not None:
        text += f" {plus_minus} {figure.estimate.high - figure.estimate.mean:.1f}"
    return text + (f" {MARK}" if figure.significant else "")


def cost_cells(result: RowResult) -> list[str]:
    """Visual tokens, seconds a step, prefill and decoding."""
    speed = result.speed
    return [
        "–" if result.image_tokens is None else str(result.image_tokens),
        "–" if result.step_seconds is None else f"{result.step_seconds:.3f}",
        f"{speed['prefill_ms']:.1f}" if speed else "–",
        f"{speed['decode_tokens_per_s']:.0f}" if speed else "–",
    ]


def state_text(result: RowResult) -> str:
    """Whether a row is whole."""
    if result.problems:
        return "failed"
    return f"{result.open} run(s) left" if result.open else "done"
