"""Q-Mamba, table 3: the connector in front trained or from scratch, with 256 queries (22 of 64 in the playground)."""

from vlmamba.ablations import OFFICIAL, Row, Table

PAPER = ("VQAv2", "GQA", "VizWiz", "TextVQA", "POPE")
TRAINED = dict(zip(PAPER, (75.01, 58.10, 50.53, 48.8, 86.9), strict=True))
SCRATCH = dict(zip(PAPER, (74.22, 56.30, 53.12, 48.0, 86.4), strict=True))
QMAMBA = {"connector": "qmamba", "front": "vss-l2", "num_queries": 22}
LAYERS = {"pretrain": {"model.connector.init": {"layers": "checkpoints/mamba-130m"}}}


def table(recipe: str = "q_mamba") -> Table:
    """The Mamba layers start from Mamba-130M at full size, afresh in the playground (see q_mamba_layers)."""
    playground = recipe == "playground"
    settings = QMAMBA if playground else {"num_queries": 256}
    stages = {} if playground else LAYERS
    vl = Row(
        name="VL-Mamba",
        recipe=None if playground else "vl_mamba",
        settings={"connector": "vss-l2"},
        shown=False,
    )
    return Table(
        title="Initialisation (Q-Mamba, table 3)",
        question="Does it help to start from a trained connector in front?",
        source="Q-Mamba, table 3",
        recipe=recipe,
        settings={"short": True} if playground else {},
        rows=[
            vl,
            Row(
                name="From VL-Mamba",
                settings=settings,
                parts={"pre": "VL-Mamba"},
                stages=stages,
                paper=TRAINED,
            ),
            Row(name="From scratch", settings=settings, stages=stages, paper=SCRATCH),
        ],
        columns=("playground", "playground/*") if playground else OFFICIAL,
    )
