"""VL-Mamba, ablation 3: the connector, with SigLIP, Mamba-2.8B-Slimpj and bidirectional scans."""

from vlmamba.ablations import OFFICIAL, Row, Table

VSS_L2 = {"VQAv2": 76.6, "SQA-I": 65.4, "TextVQA": 48.9, "MME": 1369.6, "MM-Vet": 32.6}


def table(recipe: str = "vl_mamba") -> Table:
    """MLP, VSS-MLP, VSS-L2."""
    playground = recipe == "playground"
    return Table(
        title="Connectors (VL-Mamba, ablation 3)",
        question="Does a 2-D scan in the connector help, and which of its two forms?",
        source="arXiv 2403.13600, section 4.4; of its table only the figures that its text names",
        recipe=recipe,
        settings={"short": True} if playground else {},
        rows=[
            Row(name="MLP", settings={"connector": "mlp"}),
            Row(name="VSS-MLP", settings={"connector": "vss-mlp"}),
            Row(name="VSS-L2", settings={"connector": "vss-l2"}, paper=VSS_L2),
        ],
        columns=("playground", "playground/*") if playground else OFFICIAL,
    )
