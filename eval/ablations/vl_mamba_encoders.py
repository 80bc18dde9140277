"""VL-Mamba, ablation 2: the vision encoder, with Mamba-2.8B-Slimpj and an MLP."""

from vlmamba.ablations import OFFICIAL, Row, Table
from vlmamba.errors import ConfigError
from vlmamba.training import published


def table(recipe: str = "vl_mamba") -> Table:
    """CLIP-ViT-L/14 at 336 pixels and SigLIP-SO400M/14 at 384."""
    if recipe != "vl_mamba":
        raise ConfigError(f"this table compares published encoders, under vl_mamba only, not {recipe!r}")
    encoders = {"CLIP-ViT-L": published.CLIP_LARGE_336, "SigLIP-SO": published.SIGLIP_SO400M}
    return Table(
        title="Vision encoders (VL-Mamba, ablation 2)",
        question="CLIP or SigLIP?",
        source="arXiv 2403.13600, section 4.4, whose text says: SigLIP is better on most benchmarks, CLIP on MME",
        recipe=recipe,
        settings={"connector": "mlp"},
        rows=[Row(name=name, settings={"model.vision": value.to_dict()}) for name, value in encoders.items()],
        columns=OFFICIAL,
    )
