"""Q-Mamba, table 4: fewer scan directions at inference than in training, with 729 queries (64 in the playground)."""

from vlmamba.ablations import OFFICIAL, Row, Table

PAPER = ("VQAv2", "GQA", "VizWiz", "TextVQA", "POPE")
FIGURES = {
    "Bidirectional": (75.01, 58.10, 50.53, 48.8, 86.9),
    "Forward only": (76.58, 58.44, 50.00, 50.0, 86.9),
}
QMAMBA = {"connector": "qmamba", "front": "vss-l2", "num_queries": 64}


def table(recipe: str = "q_mamba") -> Table:
    """One training for all rows; backward only is ours."""
    playground = recipe == "playground"
    shared = {"settings": QMAMBA if playground else {"num_queries": 729}, "parts": {"pre": "VL-Mamba"}}
    vl = Row(
        name="VL-Mamba",
        recipe=None if playground else "vl_mamba",
        settings={"connector": "vss-l2"},
        shown=False,
    )
    paper = {name: dict(zip(PAPER, values, strict=True)) for name, values in FIGURES.items()}
    return Table(
        title="Scan directions at inference (Q-Mamba, table 4)",
        question="Can a trained Q-Mamba do with fewer directions?",
        source="Q-Mamba, table 4, whose row for both directions has the figures of table 1's Q = 256",
        recipe=recipe,
        settings={"short": True} if playground else {},
        rows=[
            vl,
            Row(name="Bidirectional", paper=paper["Bidirectional"], **shared),
            Row(name="Forward only", switches={"scan": "forward"}, paper=paper["Forward only"], **shared),
            Row(name="Backward only", switches={"scan": "backward"}, **shared),
        ],
        columns=("playground", "playground/*") if playground else OFFICIAL,
    )
