"""Ours: Q-Mamba's Mamba layers from a language model (Mamba-130M at full size, the mini Mamba here) or afresh."""

from vlmamba.ablations import OFFICIAL, Row, Table

# Layers that start from a language model need its state size.
QMAMBA = {
    "connector": "qmamba",
    "front": "vss-l2",
    "num_queries": 22,
    "model.connector.options.state_size": 16,
}


def table(recipe: str = "q_mamba") -> Table:
    """Both behind a trained VL-Mamba connector."""
    playground = recipe == "playground"
    settings = QMAMBA if playground else {"num_queries": 256}
    path = "playground/mini/mamba" if playground else "checkpoints/mamba-130m"
    vl = Row(
        name="VL-Mamba",
        recipe=None if playground else "vl_mamba",
        settings={"connector": "vss-l2"},
        shown=False,
    )
    starts = {"Afresh": {}, "From a language model": {"layers": path}}
    return Table(
        title="Q-Mamba's layers: afresh or from a language model",
        question="Does it help Q-Mamba's Mamba layers to start from those of a language model?",
        recipe=recipe,
        settings={"short": True} if playground else {},
        rows=[
            vl,
            *(
                Row(
                    name=name,
                    settings=settings,
                    parts={"pre": "VL-Mamba"},
                    stages={"pretrain": {"model.connector.init": init}},
                )
                for name, init in starts.items()
            ),
        ],
        columns=("playground", "playground/*") if playground else OFFICIAL,
    )
