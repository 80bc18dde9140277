"""Optimizers: groups, decay, state by name; the schedule's values."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
from torch import nn

from vlmamba.errors import ConfigError
from vlmamba.training.config import GroupConfig, OptimConfig, ScheduleConfig
from vlmamba.training.optim import (
    build_optimizer,
    current_lr,
    decays,
    load_named_state,
    named_state,
    parameter_groups,
    set_learning_rate,
)
from vlmamba.training.schedule import Schedule


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(2, 4)
        self.conv1d = nn.Conv1d(4, 4, 3, groups=4)
        self.A_log = nn.Parameter(torch.zeros(4, 2))
        self.D = nn.Parameter(torch.ones(4))
        self.norm = nn.LayerNorm(2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = Mixer()
        self.head = nn.Linear(2, 2, bias=False)


def groups_by_name(model: nn.Module, **values: Any) -> dict[str, tuple[float, float]]:
    groups = parameter_groups(model, OptimConfig(**{"lr": 0.1, "weight_decay": 0.5, **values}))
    return {name: (g["lr"], g["weight_decay"]) for g in groups for name in g["names"]}


class TestGroups:
    def test_decay_only_on_matrices_and_kernels(self) -> None:
        decayed = {n for n, p in Model().named_parameters() if decays(n, p)}
        assert decayed == {"mixer.in_proj.weight", "mixer.conv1d.weight", "head.weight"}

    def test_group_values(self) -> None:
        values = groups_by_name(Model())
        assert values["head.weight"] == (0.1, 0.5)
        for name in ("mixer.in_proj.bias", "mixer.A_log", "mixer.D", "mixer.norm.weight", "mixer.norm.bias"):
            assert values[name] == (0.1, 0.0)
        assert len(parameter_groups(Model(), OptimConfig(lr=0.1, weight_decay=0.5))) == 2

    def test_multipliers_first_match_counts(self) -> None:
        values = groups_by_name(
            Model(),
            groups=(
                GroupConfig(match=r"mixer.in_proj", lr=0.5),
                GroupConfig(match="mixer", lr=2.0, weight_decay=0.0),
            ),
        )
        assert values["mixer.in_proj.weight"] == (0.05, 0.5)
        assert values["mixer.conv1d.weight"] == (0.2, 0.0)
        assert values["head.weight"] == (0.1, 0.5)

    def test_unmatched_pattern_raises(self) -> None:
        with pytest.raises(
            ConfigError, match=r"optim.groups: the pattern 'mixr' matches no parameter. Did you"
        ):
            groups_by_name(Model(), groups=(GroupConfig(match="mixr"),))

    def test_frozen_only_warns(self, caplog: pytest.LogCaptureFixture) -> None:
        model = Model()
        model.head.requires_grad_(False)
        with caplog.at_level(logging.WARNING):
            groups_by_name(model, groups=(GroupConfig(match="head"),))
        assert "'head' matches frozen parameters only" in caplog.text

    def test_nothing_trains(self) -> None:
        with pytest.raises(ConfigError, match="no parameter requires gradients"):
            parameter_groups(Model().requires_grad_(False), OptimConfig(lr=1.0))


@pytest.mark.parametrize("name", ["adamw", "radam"])
class TestOptimizers:
    def train(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            loss = torch.zeros(())
            for p in model.parameters():
                loss = loss + (p * torch.randn(p.shape, generator=generator)).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def test_equals_torch(self, name: str) -> None:
        ours, theirs = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
        theirs.load_state_dict(ours.state_dict())
        shared: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.2, "betas": (0.8, 0.9), "eps": 1e-6}
        config = OptimConfig(name=name, **shared)  # type: ignore[arg-type]
        reference: torch.optim.Optimizer
        if name == "adamw":
            reference = torch.optim.AdamW(theirs.parameters(), **shared)
        else:
            reference = torch.optim.RAdam(theirs.parameters(), decoupled_weight_decay=True, **shared)
        self.train(ours, build_optimizer(ours, config), 8, seed=1)
        self.train(theirs, reference, 8, seed=1)
        assert torch.equal(ours.weight, theirs.weight)

    def test_state_by_name_restores(self, name: str) -> None:
        torch.manual_seed(0)
        first, second = Model(), Model()
        config = OptimConfig(name=name, lr=0.1, weight_decay=0.1)  # type: ignore[arg-type]
        optimizer, other = build_optimizer(first, config), build_optimizer(second, config)
        self.train(first, optimizer, 3, seed=1)
        second.load_state_dict(first.state_dict())
        saved = copy.deepcopy(named_state(optimizer))
        load_named_state(other, dict(reversed(saved.items())))
        self.train(first, optimizer, 3, seed=2)
        self.train(second, other, 3, seed=2)
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(a, b)


class TestSchedule:
    def factors(self, total: int, **values: Any) -> list[float]:
        schedule = Schedule(ScheduleConfig(**values), total)
        return [schedule.factor(step) for step in range(total)]

    def test_cosine_golden(self) -> None:
        found = self.factors(10, warmup_steps=2)
        # 1/3, 2/3, then (1 + cos(pi k / 8)) / 2
        expected = [0.333333, 0.666667, 1.0, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060]
        assert found == pytest.approx(expected, abs=1e-6)

    def test_linear_with_floor_golden(self) -> None:
        found = self.factors(5, name="linear", warmup_steps=0, min_lr_ratio=0.5)
        assert found == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6])

    def test_constant_and_ratio(self) -> None:
        found = self.factors(100, name="constant", warmup_ratio=0.03)
        assert found[:4] == [0.25, 0.5, 0.75, 1.0] and set(found[3:]) == {1.0}

    def test_warmup_ratio_rounds_up(self) -> None:
        assert Schedule(ScheduleConfig(warmup_ratio=0.03), 5198).warmup_steps == math.ceil(0.03 * 5198) == 156

    def test_warmup_longer_than_run(self) -> None:
        with pytest.raises(ConfigError, match="5 warm-up steps are more than the run's 4 steps"):
            Schedule(ScheduleConfig(warmup_steps=5), 4)

    def test_sets_every_group(self) -> None:
        optimizer = build_optimizer(Model(), OptimConfig(lr=0.1, groups=(GroupConfig(match="head", lr=3.0),)))
        set_learning_rate(optimizer, 0.5)
        assert {round(g["lr"], 6) for g in optimizer.param_groups} == {0.05, 0.15}
        assert current_lr(optimizer) == pytest.approx(0.15)
