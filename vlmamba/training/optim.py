"""Optimizers and their parameter groups."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vlmamba.errors import ConfigError
from vlmamba.registry import Registry
from vlmamba.training.config import OptimConfig
from vlmamba.training.parts import match_parameters, trainable_parameters
from vlmamba.training.sharded import cut_like

logger = logging.getLogger(__name__)

# Mamba's state matrix and skip are not weights of a map: decaying them pulls the dynamics towards no memory.
# The authors' code marks both as exempt (state-spaces/mamba, mamba_simple.py, `_no_weight_decay`).
NO_DECAY_NAMES = ("A_log", "D")


def _adamw(groups: list[dict[str, Any]], config: OptimConfig, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def _radam(groups: list[dict[str, Any]], config: OptimConfig, fused: bool) -> torch.optim.Optimizer:
    # Rectified Adam (Liu et al., arXiv 1908.03265) with weight decay decoupled as in AdamW.
    return torch.optim.RAdam(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, decoupled_weight_decay=True
    )


OPTIMIZERS: Registry[Callable[[list[dict[str, Any]], OptimConfig, bool], torch.optim.Optimizer]] = Registry(
    "optimizer"
)
OPTIMIZERS.add("adamw", _adamw)
OPTIMIZERS.add("radam", _radam)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices and kernels, not to biases, norms, scales, A_log or D."""
    leaf = name.rpartition(".")[2]
    return parameter.ndim > 1 and leaf != "bias" and leaf not in NO_DECAY_NAMES


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters grouped by learning rate and weight decay.

    Each group carries ``base_lr`` (the peak, before the schedule) and ``names``. A parameter belongs to the
    first entry of ``config.groups`` that matches it.

    Raises:
        ConfigError: Nothing trains, or an entry of ``config.groups`` matches no parameter.
    """
    parameters = trainable_parameters(model)
    if not parameters:
        raise ConfigError("train: no parameter requires gradients, so there is nothing to optimize.")
    multipliers: dict[str, tuple[float, float]] = {}
    matched = match_parameters(model, [g.match for g in config.groups], key="optim.groups")
    for group in config.groups:
        names = [n for n in matched[group.match] if n in parameters]
        if not names:
            logger.warning("optim.groups: %r matches frozen parameters only and has no effect.", group.match)
        for name in names:
            multipliers.setdefault(name, (group.lr, group.weight_decay))
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        lr, decay = multipliers.get(name, (1.0, 1.0))
        weight_decay = config.weight_decay * decay if decays(name, parameter) else 0.0
        # torch's grouped updates cannot mix cut tensors (FSDP2) with whole ones.
        key = (config.lr * lr, weight_decay, is_cut(parameter))
        group_of = groups.setdefault(
            key, {"params": [], "names": [], "lr": key[0], "base_lr": key[0], "weight_decay": weight_decay}
        )
        group_of["params"].append(parameter)
        group_of["names"].append(name)
    return list(groups.values())


def is_cut(parameter: torch.Tensor) -> bool:
    """Whether a parameter is spread over processes."""
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer over the model's trainable parameters; see `parameter_groups`."""
    groups = parameter_groups(model, config)
    fused = all(p.is_cuda for g in groups for p in g["params"])
    return OPTIMIZERS.get(config.name)(groups, config, fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group to its peak rate times a factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def current_lr(optimizer: torch.optim.Optimizer) -> float:
    """The highest learning rate in use, the one that the log shows."""
    return float(max(group["lr"] for group in optimizer.param_groups))


def named_state(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The optimizer's state by parameter name, so that it does not depend on the order or number of
    groups.
    """
    return {
        name: dict(optimizer.state[parameter])
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        if parameter in optimizer.state
    }


def load_named_state(optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Any]]) -> None:
    """Put a state saved by `named_state` into an optimizer over the same parameters.

    Raises:
        KeyError: The state names a parameter that the optimizer does not have.
    """
    names = [name for group in optimizer.param_groups for name in group["names"]]
    position = {name: i for i, name in enumerate(names)}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def fit(name: str, value: Any) -> Any:
        parameter = parameters[position[name]]
        whole = isinstance(value, torch.Tensor) and value.shape == parameter.shape and not is_cut(value)
        return cut_like(parameter, value) if whole and is_cut(parameter) else value

    # torch's own loading puts each tensor where its optimizer keeps it (step counts on the CPU, moments with
    # weights).
    current = optimizer.state_dict()
    current["state"] = {
        position[name]: {key: fit(name, value) for key, value in values.items()}
        for name, values in state.items()
    }
    optimizer.load_state_dict(current)
