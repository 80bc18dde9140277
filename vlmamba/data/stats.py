"""How long the rows of a data set are, and what padding each way of batching them costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlmamba.data.lengths import BAD, TOO_LONG, USABLE, LengthTable
from vlmamba.data.packing import PACK_MULTIPLE
from vlmamba.data.sampler import Grouping, PlanSettings, plan_epoch
from vlmamba.pages import render
from vlmamba.pages.charts import Series, chart

BAR = 40
LENGTHS = "tokens of a row, image tokens included"
SAMPLED_STEPS = 400
"""Plans are accounted over so many of their steps, evenly spread."""


@dataclass(frozen=True)
class Layout:
    """One way to batch rows, and what it costs.

    Attributes:
        name: What it is called.
        padding: Share of padding among all positions.
        idle: Share of the ranks' positions lost to padding and to waiting for the fullest rank.
        image_idle: The same of the encoder's work.
        micro_steps: Micro-steps of a rank in an optimizer step, on average.
        positions: Positions of a rank's micro-batch, on average.
    """

    name: str
    padding: float
    idle: float
    image_idle: float
    micro_steps: float
    positions: float


def histogram(lengths: np.ndarray, *, bins: int = 16) -> list[tuple[int, int, int]]:
    """Counts of lengths in bins of round width: (from, up to and without, rows)."""
    longest = int(lengths.max(initial=1))
    width = max(8, -(-longest // bins // 8) * 8)
    edges = np.arange(0, longest + width + 1, width)
    counts, _ = np.histogram(lengths, edges)
    return [(int(a), int(b), int(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]


def layouts(
    lengths: np.ndarray,
    num_images: np.ndarray,
    *,
    step_samples: int,
    micro_samples: int,
    pack_lengths: Sequence[int],
    ranks: int = 1,
    seed: int = 0,
) -> list[Layout]:
    """What the ways of batching cost: padded at random, padded by length, packed.

    Args:
        lengths: Tokens of each row.
        num_images: Images of each row.
        step_samples: Rows of an optimizer step.
        micro_samples: Rows of a padded micro-batch.
        pack_lengths: Lengths of packed rows to try; those that do not hold the longest row are left out.
        ranks: Number of processes.
        seed: Of the order.
    """
    micro = max(min(micro_samples, step_samples // ranks), 1)
    padded: list[tuple[str, Grouping]] = [
        (f"padded, {micro} a micro-batch, random order", "random"),
        (f"padded, {micro} a micro-batch, grouped by length", "length"),
        (f"padded, {micro} a micro-batch, by length and modality", "modality_length"),
    ]
    plans = [
        (name, PlanSettings(step_samples=step_samples, micro_samples=micro, grouping=grouping, seed=seed))
        for name, grouping in padded
    ]
    for budget in pack_lengths:
        if budget >= lengths.max(initial=0):
            settings = PlanSettings(
                step_samples=step_samples, pack_tokens=budget, pad_to_multiple_of=PACK_MULTIPLE, seed=seed
            )
            plans.append((f"packed to {budget:,}, random order", settings))
        rows = max(round(step_samples * float(lengths.mean()) / budget / ranks), 1) * ranks
        if budget >= lengths.max(initial=0):
            settings = replace(settings, step_samples=None, step_tokens=rows * budget)
            plans.append((f"packed to {budget:,}, {rows * budget:,} tokens a step", settings))
    found = []
    for name, settings in plans:
        plan = plan_epoch(np.arange(len(lengths)), settings, 0, lengths=lengths, num_images=num_images)
        account = plan.account(world_size=ranks, steps=SAMPLED_STEPS)
        steps = max(min(len(plan), SAMPLED_STEPS), 1)
        found.append(
            Layout(
                name,
                account.padding,
                account.idle,
                account.image_idle,
                account.micro_batches / ranks / steps,
                account.positions / max(account.micro_batches, 1),
            )
        )
    return found


def stats_text(table: LengthTable, found: Sequence[Layout], *, title: str, ranks: int) -> str:
    """Histogram and table for a terminal."""
    usable = table.values[table.status == USABLE]
    lengths, tokens, supervised = usable[:, 0], int(usable[:, 0].sum()), int(usable[:, 2].sum())
    bad, long = ((table.status == status).sum() for status in (BAD, TOO_LONG))
    rows = histogram(lengths)
    top = max((count for _, _, count in rows), default=1) or 1
    lines = [
        title,
        f"{len(table):,} rows, {len(usable):,} usable ({bad:,} bad, {long:,} too long), "
        f"{(usable[:, 1] > 0).sum():,} with images",
        f"{tokens:,} tokens, {supervised:,} supervised ({supervised / max(tokens, 1):.1%}); a row: "
        + ", ".join(f"{name} {value:,.0f}" for name, value in quantiles(lengths)),
        "",
        LENGTHS,
    ]
    lines += [
        f"  {low:>6,} - {high - 1:<6,} {count:>9,}  {'#' * round(BAR * count / top)}"
        for low, high, count in rows
    ]
    header = f"  {'':<52} {'padding':>8} {'idle':>8} {'encoder':>8} {'micro':>8} {'positions':>10}"
    lines += ["", f"batches on {ranks} rank{'s' if ranks > 1 else ''}", header]
    lines += [
        f"  {layout.name:<52} {layout.padding:>8.1%} {layout.idle:>8.1%} {layout.image_idle:>8.1%} "
        f"{layout.micro_steps:>8.1f} {layout.positions:>10,.0f}"
        for layout in found
    ]
    return "\n".join(lines)


def quantiles(lengths: np.ndarray) -> list[tuple[str, float]]:
    """Median, mean, 95th percentile and longest."""
    if not len(lengths):
        return []
    return [
        ("median", float(np.median(lengths))),
        ("mean", float(lengths.mean())),
        ("95 %", float(np.percentile(lengths, 95))),
        ("longest", float(lengths.max())),
    ]


def stats_html(table: LengthTable, text: str, *, title: str) -> str:
    """A page of its own with the histogram as a picture."""
    shown = {"label": "", "note": LENGTHS, "svg": stats_chart(table)}
    return render("stats.html", title=title, chart=shown, text=text)


def stats_chart(table: LengthTable) -> str:
    """The histogram as SVG."""
    rows = histogram(table.lengths[table.status == USABLE])
    notes = [f"{low} - {high - 1} tokens: {count} rows" for low, high, count in rows]
    bars = Series([((low + high) / 2, float(count)) for low, high, count in rows], "bars", notes=notes)
    return chart([bars], label=LENGTHS, x="tokens", y="rows", width=720)
