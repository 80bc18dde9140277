"""Encoder and connector through torch.compile: the same losses, names and exports. Needs a C++ compiler; slow."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlmamba.errors import ConfigError
from vlmamba.training.config import TrainConfig
from vlmamba.training.metrics import read_log
from vlmamba.training.run import run

MakeConfig = Callable[..., TrainConfig]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
@pytest.mark.parametrize("connector", ["mlp", "vss-l2"])
def test_compiled_parts_learn_the_same(make_config: MakeConfig, connector: str) -> None:
    common = {"model.connector.name": connector, "epochs": None, "max_steps": 3, "optim.eps": 1e-3}
    plain = make_config(common, output="plain")
    compiled = make_config({**common, "compile": "vision_tower,multi_modal_projector"}, output="compiled")
    run(plain)
    run(compiled)
    first, second = (
        [line["loss"] for line in read_log(Path(c.output) / "log.jsonl")] for c in (plain, compiled)
    )
    assert len(first) == 3 and second == pytest.approx(first, abs=1e-4)
    weights, others = (load_file(Path(c.output) / "export" / "model.safetensors") for c in (plain, compiled))
    assert weights.keys() == others.keys()
    assert all(torch.allclose(weights[name], others[name], atol=1e-4) for name in weights)


def test_parts_that_cannot_be_compiled(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="compile: 'language_model' cannot be compiled; vision_tower and"):
        make_config({"compile": "language_model"})
