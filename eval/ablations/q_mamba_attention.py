"""Q-Mamba, table 2: local against global cross-attention, with 256 queries (22 of 64 patches in the playground)."""

from vlmamba.ablations import OFFICIAL, Row, Table

PAPER = ("VQAv2", "GQA", "VizWiz", "TextVQA", "POPE")
QMAMBA = {"connector": "qmamba", "front": "vss-l2", "num_queries": 22}


def table(recipe: str = "q_mamba") -> Table:
    """Both start from a trained VL-Mamba."""
    playground = recipe == "playground"
    settings = QMAMBA if playground else {"num_queries": 256}
    figures = {
        "Local": dict(zip(PAPER, (75.01, 58.10, 50.53, 48.8, 86.9), strict=True)),
        "Global": dict(zip(PAPER, (73.12, 52.87, 49.09, 44.0, 85.1), strict=True)),
    }
    vl = Row(
        name="VL-Mamba",
        recipe=None if playground else "vl_mamba",
        settings={"connector": "vss-l2"},
        shown=False,
    )
    return Table(
        title="Cross-attention (Q-Mamba, table 2)",
        question="Should a query see its own patches only, or all?",
        source="Q-Mamba, table 2",
        recipe=recipe,
        settings={"short": True} if playground else {},
        rows=[
            vl,
            Row(name="Local", settings=settings, parts={"pre": "VL-Mamba"}, paper=figures["Local"]),
            Row(
                name="Global",
                settings={**settings, "model.connector.options.attention": "global"},
                parts={"pre": "VL-Mamba"},
                paper=figures["Global"],
            ),
        ],
        baseline="Local",
        columns=("playground", "playground/*") if playground else OFFICIAL,
    )
