"""Checks of the run's settings, and what stands in for parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vlmamba.common.processes import pick_device
from vlmamba.config import dump_yaml, field_infos, load_yaml
from vlmamba.errors import ConfigError
from vlmamba.training.config import TrainConfig
from vlmamba.training.data import plan_settings
from vlmamba.training.parallel import Parallel, make_parallel

MakeConfig = Callable[..., TrainConfig]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch.micro_batch_size": 3},
            "4 is not a multiple of batch.micro_batch_size 3",
        ),
        (
            {"batch.tokens_per_micro_batch": 512},
            "set exactly one of micro_batch_size and tokens_per",
        ),
        (
            {"batch.micro_batch_size": "none"},
            "set exactly one of micro_batch_size and tokens_per",
        ),
        (
            {"batch.micro_batch_size": "none", "batch.tokens_per_micro_batch": 100},
            "tokens_per_micro_batch 100 is smaller than data.max_length 128",
        ),
        ({"train": "[]"}, "nothing would train"),
        ({"epochs": "none"}, "set epochs or max_steps; both are none"),
        ({"max_steps": 0}, "max_steps must be positive, got 0"),
        ({"optim.lr": 0}, "optim.lr must be positive, got 0.0"),
        ({"optim.betas": "0.9,1.0"}, r"optim.betas must lie in \[0, 1\)"),
        ({"optim.name": "sgd"}, "optim.name: 'sgd' is not one of 'adamw', 'radam'"),
        ({"schedule.warmup_ratio": 3}, "schedule.warmup_ratio is a share from 0 to 1, got 3.0"),
        ({"grad_clip": 0}, "grad_clip must be positive, got 0.0"),
        ({"precision": "fp16"}, "precision: 'fp16' is not one of 'bf16', 'fp32'"),
        ({"data.sources": "[]"}, "data.sources: no source given"),
        ({"data.sources.0.weight": 0}, "must be positive, got 0.0"),
        ({"data.order": "lenght"}, "Did you mean 'length'"),
        ({"model.connector.name": "vss_l2"}, "unknown connector 'vss_l2'. Did you mean 'vss-l2'"),
    ],
)
def test_settings_that_cannot_work(make_config: MakeConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(changes)


def test_yaml_round_trip(make_config: MakeConfig, tmp_path: Any) -> None:
    config = make_config({"model.connector.options.num_queries": 4, "model.connector.name": "qmamba"})
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert load_yaml(tmp_path / "config.yaml") == config


def test_every_setting_is_documented() -> None:
    undocumented = [info.path for info in field_infos(TrainConfig) if not info.doc]
    assert undocumented == []


def test_global_batch_and_world_size(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"4 is not a multiple of batch.micro_batch_size 2 x 4 processes"):
        plan_settings(make_config(), 4)


def test_launcher_with_more_processes(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for strategy in ("single", "auto"):
        alone = make_parallel(strategy, "cpu", make_config())
        assert type(alone) is Parallel and not torch.distributed.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"started 2 processes .* 'single' uses 1"):
        make_parallel("single", "cpu")


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="'gpu9' is not a device of torch"):
        pick_device("gpu9")
    with pytest.raises(ConfigError, match="unknown parallel strategy 'fsdp9'"):
        make_parallel("fsdp9", "cpu")
