"""Q-Mamba, table 1: the number of queries, beside VL-Mamba with all and with fewer directions, and Cobra."""

from typing import Any

from vlmamba.ablations import OFFICIAL, Row, Table

PAPER = ("VQAv2", "GQA", "VizWiz", "TextVQA", "POPE", "MMBench", "s/iteration")
FIGURES = {
    "Cobra": (75.38, 58.16, 49.22, 44.9, 87.6, 56.2),
    "VL-Mamba": (74.38, 56.69, 51.66, 48.7, 83.9, 57.0, 7.26),
    "VL-Mamba, forward only": (72.34, 51.92, 29.17, 45.6, 85.9, 56.7),
    "VL-Mamba, backward only": (72.06, 52.42, 34.92, 45.1, 86.1, 55.9),
    128: (74.51, 57.59, 51.03, 47.1, 87.9, 57.2, 5.52),
    256: (75.01, 58.10, 50.53, 48.8, 86.9, 57.7, 6.54),
    512: (75.42, 58.37, 48.90, 50.2, 86.5, 57.6, 5.94),
    729: (75.62, 58.33, 49.30, 51.2, 86.8, 58.0, 7.54),
}
PLAYGROUND = {128: 11, 256: 22, 512: 45, 729: 64}
"""The same shares of the playground's 64 patches."""


def paper(key: str | int) -> dict[str, float]:
    """A row's figures by column."""
    return dict(zip(PAPER, FIGURES[key], strict=False))


def queries(number: int, playground: bool) -> dict[str, Any]:
    """Settings of so many queries (of 729)."""
    if not playground:
        return {"num_queries": number}
    return {"connector": "qmamba", "front": "vss-l2", "num_queries": PLAYGROUND[number]}


def table(recipe: str = "q_mamba") -> Table:
    """Every Q-Mamba starts from the VL-Mamba of its seed, as the paper's does."""
    playground = recipe == "playground"
    vl = {"settings": {"connector": "vss-l2"}, "recipe": None if playground else "vl_mamba"}
    rows = [
        Row(name="VL-Mamba", paper=paper("VL-Mamba"), **vl),
        Row(
            name="VL-Mamba, forward only",
            switches={"scan": "forward"},
            paper=paper("VL-Mamba, forward only"),
            **vl,
        ),
        Row(
            name="VL-Mamba, backward only",
            switches={"scan": "backward"},
            paper=paper("VL-Mamba, backward only"),
            **vl,
        ),
    ]
    for number in (128, 256, 512, 729):
        shown = f"{PLAYGROUND[number]} (paper: {number})" if playground else number
        settings = queries(number, playground)
        rows.append(
            Row(name=f"Q = {shown}", settings=settings, parts={"pre": "VL-Mamba"}, paper=paper(number))
        )
    if not playground:  # Cobra leaves stage 1 out
        rows.insert(0, Row(name="Cobra", recipe="cobra:finetune", paper=paper("Cobra")))
    return Table(
        title="Queries (Q-Mamba, table 1)",
        question="How many queries does Q-Mamba need, and what do scan directions matter to VL-Mamba once trained?",
        source="Q-Mamba, table 1",
        recipe=recipe,
        settings={"short": True} if playground else {},
        rows=rows,
        baseline="VL-Mamba",
        columns=("playground", "playground/*") if playground else OFFICIAL,
    )
