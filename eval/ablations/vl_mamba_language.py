"""VL-Mamba, ablation 1: the language model, behind CLIP and an MLP."""

from typing import Any

from vlmamba.ablations import OFFICIAL, Row, Table
from vlmamba.errors import ConfigError
from vlmamba.models.builder import LanguageConfig
from vlmamba.training import published


def pile(size: str) -> dict[str, Any]:
    """A Mamba trained on the Pile."""
    path = f"checkpoints/mamba-{size}"
    hint = f"hf download state-spaces/mamba-{size} --local-dir {path}"
    return LanguageConfig(path=path, tokenizer="checkpoints/gpt-neox-20b", preset=size, hint=hint).to_dict()


def table(recipe: str = "vl_mamba") -> Table:
    """Mamba-1.4B and -2.8B (Pile, 300 B tokens), Mamba-2.8B-Slimpj (SlimPajama, 627 B)."""
    if recipe != "vl_mamba":
        raise ConfigError(
            f"this table compares published language models, under vl_mamba only, not {recipe!r}"
        )
    languages = {
        "Mamba-1.4B": pile("1.4b"),
        "Mamba-2.8B-Pile": pile("2.8b"),
        "Mamba-2.8B-Slimpj": published.MAMBA_SLIMPJ.to_dict(),
    }
    return Table(
        title="Language models (VL-Mamba, ablation 1)",
        question="How much do the size and the training tokens of the language model matter?",
        source="arXiv 2403.13600, section 4.4, whose text says: Slimpj is best on every benchmark",
        recipe=recipe,
        settings={"connector": "mlp", "model.vision": published.CLIP_LARGE_336.to_dict()},
        rows=[Row(name=name, settings={"model.language": value}) for name, value in languages.items()],
        columns=OFFICIAL,
    )
