"""Ours: connector x encoder x visual tokens, against what they cost."""

from typing import Any

from vlmamba.ablations import OFFICIAL, Row, Table
from vlmamba.training import published


def table(recipe: str = "vl_mamba") -> Table:
    """Under the playground's recipe there is one encoder, and runs are those of the other tables."""
    return _playground(recipe) if recipe == "playground" else _full(recipe)


def _playground(recipe: str) -> Table:
    def queries(number: int) -> dict[str, Any]:
        return {"connector": "qmamba", "front": "vss-l2", "num_queries": number}

    rows = [Row(name=name, settings={"connector": name.lower()}) for name in ("MLP", "VSS-MLP", "VSS-L2")]
    rows.append(
        Row(name="VSS-L2, CSM", settings={"connector": "vss-l2", "model.connector.options.scan": "csm"})
    )
    for number in (11, 22, 45, 64):
        rows.append(Row(name=f"Q-Mamba, {number}", settings=queries(number), parts={"pre": "VSS-L2"}))
    rows.append(
        Row(
            name="Q-Mamba, 64 trained, 22 kept",
            settings=queries(64),
            parts={"pre": "VSS-L2"},
            switches={"num_queries": 22},
        )
    )
    return Table(
        title="Connectors, visual tokens and speed",
        question="What does each connector cost, and what does it give?",
        recipe=recipe,
        settings={"short": True},
        rows=rows,
        columns=("playground", "playground/*"),
    )


def _full(recipe: str) -> Table:
    encoders = {"CLIP": published.CLIP_LARGE_336, "SigLIP": published.SIGLIP_SO400M}
    rows = []
    for encoder, vision in encoders.items():
        for connector in ("mlp", "vss-l2"):
            settings = {"connector": connector, "model.vision": vision.to_dict()}
            rows.append(Row(name=f"{encoder}, {connector}", settings=settings))
        for number in (128, 256, 512):
            settings = {"num_queries": number, "model.vision": vision.to_dict()}
            rows.append(
                Row(
                    name=f"{encoder}, Q-Mamba {number}",
                    recipe="q_mamba",
                    settings=settings,
                    parts={"pre": f"{encoder}, vss-l2"},
                )
            )
    return Table(
        title="Connectors, encoders, visual tokens and speed",
        question="What does each connector cost, and what does it give?",
        recipe=recipe,
        rows=rows,
        columns=OFFICIAL,
    )
