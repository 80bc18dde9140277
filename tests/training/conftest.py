"""A tiny task on disk: encoder, language model, images and conversations, and the config that trains on
them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmamba.config import apply_overrides
from vlmamba.testing import tiny_tokenizer, write_images, write_llava_json
from vlmamba.training.config import TrainConfig

ROWS = 20


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``vision`` and ``language``, as a user would have downloaded them."""
    from transformers import MambaConfig, SiglipVisionConfig, SiglipVisionModel, initialization

    from vlmamba.models.language import MambaLM

    root = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        vision = SiglipVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        )
        with (
            pytest.MonkeyPatch.context() as patch
        ):  # releases of torch draw truncated normals each in its own way
            patch.setitem(
                initialization.TORCH_INIT_FUNCTIONS,
                "trunc_normal_",
                lambda tensor, *, std, **_: tensor.normal_(
                    0, std
                ),  # as 2.15; the bounds are 12 deviations away
            )
            tower = SiglipVisionModel(vision)
        tower.save_pretrained(root / "vision")
        language = MambaConfig(
            vocab_size=368,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=4,
            pad_token_id=0,
            eos_token_id=0,
            bos_token_id=0,
        )
        MambaLM(language).save_pretrained(root / "language")
    tiny_tokenizer().save_pretrained(root / "language")
    return root


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``rows.json`` (two text-only rows among them) and ``images``."""
    root = tmp_path_factory.mktemp("task")
    names = write_images(root / "images", ROWS - 2)
    write_llava_json(root / "rows.json", names, text_only=2)
    return root


def base_values(weights: Path, task: Path, output: Path) -> dict[str, Any]:
    """The plain values of a small run: 20 rows, 5 steps of 4 an epoch."""
    return {
        "output": str(output),
        "model": {
            "vision": {"family": "siglip", "path": str(weights / "vision"), "feature_layer": -2},
            "connector": {"name": "mlp"},
            "language": {"path": str(weights / "language")},
            "image": {"mode": "resize"},
            "chat": "mamba",
        },
        "train": ["multi_modal_projector", "language_model"],
        "data": {
            "sources": [{"annotations": str(task / "rows.json"), "image_root": str(task / "images")}],
            "max_length": 128,
            "num_workers": 0,
        },
        "batch": {"global_batch_size": 4, "micro_batch_size": 2},
        "optim": {"lr": 1e-2},
        "precision": "fp32",
        "device": "cpu",
        "loggers": [],
        "save_every": 2,
    }


@pytest.fixture
def make_config(weights: Path, task: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """``make_config({"optim.lr": 1e-3}, output="a")``: the small run with dotted changes."""

    def make(changes: dict[str, Any] | None = None, *, output: str = "run") -> TrainConfig:
        config = TrainConfig.from_dict(base_values(weights, task, tmp_path / output))
        made: TrainConfig = apply_overrides(config, changes or {}).config
        return made

    return make


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No progress bars, a cache of its own."""
    monkeypatch.setenv("VLMAMBA_PROGRESS", "0")
    monkeypatch.setenv("VLMAMBA_CACHE", str(tmp_path / "cache"))
