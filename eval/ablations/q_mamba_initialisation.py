"""Q-Mamba, table 3: what its parts start from, with 256 queries (22 of 64 patches in the playground)."""

from vlmamba.ablations import OFFICIAL, Row, Table

PAPER = ("VQAv2", "GQA", "VizWiz", "TextVQA", "POPE")
TRAINED = dict(zip(PAPER, (75.01, 58.10, 50.53, 48.8, 86.9), strict=True))
SCRATCH = dict(zip(PAPER, (74.22, 56.30, 53.12, 48.0, 86.4), strict=True))
QMAMBA = {"connector": "qmamba", "front": "vss-l2", "num_queries": 22}
LAYERS = {"layers": "playground/mini/mamba"}


def table(recipe: str = "q_mamba") -> Table:
    """The paper compares the connector in front; whether the Mamba layers start from a language model is ours."""
    playground = recipe == "playground"
    settings = QMAMBA if playground else {"num_queries": 256}
    vl = Row(
        name="VL-Mamba",
        recipe=None if playground else "vl_mamba",
        settings={"connector": "vss-l2"},
        shown=False,
    )
    # Layers that start from a language model need its state size.
    wide = {**settings, "model.connector.options.state_size": 16} if playground else settings
    layers = {
        "pretrain": {"model.connector.init": LAYERS if playground else {"layers": "checkpoints/mamba-130m"}}
    }
    fresh = {"pretrain": {"model.connector.init": {}}}
    rows = [
        vl,
        Row(
            name="Front: trained VL-Mamba", settings=settings, parts={"pre": "VL-Mamba"}, paper=TRAINED,
            stages={} if playground else layers,
        ),
        Row(
            name="Front: from scratch", settings=settings, paper=SCRATCH, stages={} if playground else layers,
        ),
        Row(
            name="Layers: fresh" + (", N = 16" if playground else ""),
            settings=wide, parts={"pre": "VL-Mamba"}, stages=fresh,
        ),
    ]  # fmt: skip
    if playground:
        rows.append(
            Row(name="Layers: mini Mamba's, N = 16", settings=wide, parts={"pre": "VL-Mamba"}, stages=layers)
        )
    return Table(
        title="Initialisation (Q-Mamba, table 3)",
        question="Does a trained connector in front help, and do layers of a language model?",
        source="Q-Mamba, table 3",
        recipe=recipe,
        settings={"short": True} if playground else {},
        rows=rows,
        baseline="Front: trained VL-Mamba",
        columns=("playground", "playground/*") if playground else OFFICIAL,
    )
