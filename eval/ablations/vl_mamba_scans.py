"""VL-Mamba, ablation 4: bidirectional scan (BSM) against cross scan (CSM)."""

from vlmamba.ablations import OFFICIAL, Row, Table


def row(name: str, connector: str, scan: str, paper: dict[str, float] | None = None) -> Row:
    """A connector with a scan."""
    settings = {"connector": connector, "model.connector.options.scan": scan}
    return Row(name=name, settings=settings, paper=paper or {})


def table(recipe: str = "vl_mamba") -> Table:
    """The paper compares VSS-L2 only; VSS-MLP is ours."""
    playground = recipe == "playground"
    bsm = {"VQAv2": 76.6, "SQA-I": 65.4, "TextVQA": 48.9, "MME": 1369.6, "MM-Vet": 32.6}
    return Table(
        title="Scans (VL-Mamba, ablation 4)",
        question="Two scan directions, or four?",
        source="arXiv 2403.13600, section 4.4; of its table only the figures that its text names: equal on VQAv2, "
        "BSM better on most others",
        recipe=recipe,
        settings={"short": True} if playground else {},
        rows=[
            row("VSS-L2, BSM", "vss-l2", "bsm", bsm),
            row("VSS-L2, CSM", "vss-l2", "csm", {"VQAv2": 76.6}),
            row("VSS-MLP, BSM", "vss-mlp", "bsm"),
            row("VSS-MLP, CSM", "vss-mlp", "csm"),
        ],
        columns=("playground", "playground/*") if playground else OFFICIAL,
    )
