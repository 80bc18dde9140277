"""Golden losses: one run of each connector with all that may go wrong unseen, and the laws that hold for any numbers.

The run has dropout (in its adapters), text-only rows among the others, activations that are recomputed, and evaluations
in the middle that run the model and draw random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vlmamba.models import VLMambaForConditionalGeneration
from vlmamba.testing import write_llava_json
from vlmamba.testing.models import TINY_OPTIONS
from vlmamba.training.config import TrainConfig
from vlmamba.training.metrics import read_log
from vlmamba.training.run import run

MakeConfig = Callable[..., TrainConfig]
GOLDEN = {
    "mlp": [6.37951, 5.59248, 5.73969, 5.82560, 5.69623, 5.05758, 4.66144, 4.84515, 3.74955, 4.78346],
    "qmamba": [6.37948, 5.59014, 5.75375, 5.84264, 5.70270, 5.10001, 4.70758, 4.91149, 3.84056, 4.86006],
    "vss-l2": [6.37915, 5.60189, 5.77265, 5.87758, 5.75045, 5.15991, 4.75335, 4.92299, 3.84617, 4.90383],
    "vss-mlp": [6.37966, 5.58585, 5.74302, 5.84311, 5.72844, 5.11360, 4.67351, 4.88265, 3.75833, 4.87349],
}
"""Losses of the ten steps; a refactor must reproduce them, a change of behaviour rewrites them on purpose."""

MIXER = "language_model.backbone.layers.1.mixer"
PROGRAM = """
import torch

def look(model, processor, *, step):
    torch.rand(7)
    ids = torch.tensor([[model.config.image_token_id] * processor.num_image_tokens + [5, 6, 7]])
    return {"logit": model(input_ids=ids, pixel_values=torch.ones(1, 3, 16, 16)).logits.mean()}
"""


@pytest.fixture
def golden_config(make_config: MakeConfig, task: Path, tmp_path: Path) -> MakeConfig:
    """Ten steps of two micro-batches over 20 rows, of which 6 have no image."""
    names = sorted(path.name for path in (task / "images").iterdir())[:14]
    write_llava_json(tmp_path / "rows.json", names, text_only=6)
    (tmp_path / "look.py").write_text(PROGRAM)

    def make(connector: str, **changes: Any) -> TrainConfig:
        settings = {
            "model.connector": {"name": connector, "options": TINY_OPTIONS[connector]},
            "data.sources.0.annotations": str(tmp_path / "rows.json"),
            "data.order": "modality_length",
            "train": ["multi_modal_projector", "language_model.backbone.embeddings"],
            "lora": {"match": ["language_model.*.mixer.*"], "rank": 4, "alpha": 8.0, "dropout": 0.2},
            "gradient_checkpointing": True,
            "evaluations": [{"function": f"{tmp_path / 'look.py'}:look", "every": 3}],
            "optim.weight_decay": 0.1,
            "epochs": 2,
            "save_every": 0,
        }
        return make_config(settings | changes, output="-".join([connector, *changes]))

    return make


def losses(config: TrainConfig) -> list[float]:
    return [line["loss"] for line in read_log(run(config).run_dir / "log.jsonl")]


@contextmanager
def recorded() -> Iterator[list[tuple[str, bool]]]:
    """The modules that training calls, by name and mode, in order; not those that evaluations call."""
    calls: list[tuple[str, bool]] = []
    names: dict[nn.Module, str] = {}

    def note(module: nn.Module, _: Any) -> None:
        if isinstance(module, VLMambaForConditionalGeneration):
            names.clear()
            if torch.is_grad_enabled():
                names.update({each: name for name, each in module.named_modules()})
        if module in names:
            calls.append((names[module], module.training))

    hook = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield calls
    finally:
        hook.remove()


@pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="without MKL torch draws other dropout masks"
)
@pytest.mark.parametrize("connector", sorted(TINY_OPTIONS))
def test_losses_are_golden(golden_config: MakeConfig, connector: str) -> None:
    """Processors, backends and thread counts differ by 2e-7."""
    assert losses(golden_config(connector)) == pytest.approx(GOLDEN[connector], rel=2e-5)


@pytest.mark.parametrize(
    "stage", [{}, {"train": ["multi_modal_projector"], "lora": None}], ids=["lora", "frozen"]
)
def test_evaluations_and_recomputation_change_nothing(
    golden_config: MakeConfig, stage: dict[str, Any]
) -> None:
    """Not a bit of a loss, nor which modules are called in which mode, with and without images alike."""
    with recorded() as calls:
        found = losses(golden_config("vss-mlp", **stage))
    with recorded() as unwatched:
        assert losses(golden_config("vss-mlp", **stage, evaluations=[])) == found
    assert unwatched == calls
    with recorded() as kept:
        assert losses(golden_config("vss-mlp", **stage, gradient_checkpointing=False)) == found
    for part, recomputed in (("vision_tower", 1), ("multi_modal_projector", 1), (MIXER, 2)):
        assert [name for name, _ in calls].count(part) == 20 * recomputed, part
        assert [name for name, _ in kept].count(part) == 20, part
