"""LoRA (Hu et al., arXiv:2106.09685) through peft: low-rank updates of chosen projections, their own weights frozen.

Adapters are parameters like others from then on: they train, are saved and resumed by `requires_grad`, take part in
`optim.groups` under their names (``*.lora_A.*``, ``*.lora_B.*``), and work under every strategy. An export holds the
merged weights, a plain model, and beside them the adapter alone in peft's own layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmamba.errors import ConfigError, require
from vlmamba.models.language.weights import save_tensors
from vlmamba.registry import close_matches
from vlmamba.training.config import LoRAConfig
from vlmamba.training.parts import compile_pattern

ADAPTER = "adapter"
"""Folder inside an export."""
_NAME = "default"


def add_lora(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Put adapters around linear layers, in place; everything else keeps whether it trains.

    Args:
        model: With trained parts set.
        config: Which layers, and how.

    Returns:
        Names of the adapted layers.

    Raises:
        ConfigError: A pattern matches no linear layer, or a layer trains itself or shares its weight.
        MissingDependencyError: peft is not installed.
    """
    peft = require("peft", extra="train", feature="lora")
    names = _layers(model, config)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=names, bias="none"
    )
    peft.inject_adapter_in_model(settings, model, adapter_name=_NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name) or id(parameter) in trained)
    return names


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ".lora_" in name


def has_adapters(names: Any) -> bool:
    """Whether some parameter names are those of an adapted model."""
    return any(is_adapter(name) for name in names)


def merged_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of the model with its adapters added to the weights, under the names it had without them.

    The model itself stays as it is. Sums are taken in fp32.
    """
    state: dict[str, torch.Tensor] = {}
    modules = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        if is_adapter(name):
            continue
        layer, adapted, leaf = name.rpartition(".base_layer.")
        if adapted and leaf == "weight":
            delta: torch.Tensor = modules[layer].get_delta_weight(_NAME)
            tensor = tensor.float() + delta.detach().to(tensor.device).float()
        state[f"{layer}.{leaf}" if adapted else name] = tensor
    return state


def save_adapter(model: Any, directory: Path) -> None:
    """Write the adapters in peft's layout, which ``PeftModel.from_pretrained`` puts on the model they belong to."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": tensor
        for name, tensor in model.state_dict().items()
        if is_adapter(name)
    }
    save_tensors(tensors, directory / "adapter_model.safetensors")
    model.peft_config[_NAME].save_pretrained(str(directory))


def _layers(model: nn.Module, config: LoRAConfig) -> list[str]:
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen: list[str] = []
    for pattern in config.match:
        predicate = compile_pattern(pattern)
        matched = [name for name in linear if predicate(name)]
        if not matched:
            kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise ConfigError(
                f"lora.match: the pattern {pattern!r} matches no linear layer.{close_matches(pattern, list(linear))} "
                f"Linear layers are called {', '.join(kinds)}; write for example "
                "language_model.*.in_proj."
            )
        chosen += [name for name in matched if name not in chosen]
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name in chosen:
        weight = linear[name].weight
        if weight.requires_grad:
            raise ConfigError(
                f"lora.match: {name} would be adapted, but its own weights train by `train`. Leave it out of one of "
                "them."
            )
        if owners[id(weight)] > 1:
            raise ConfigError(
                f"lora.match: {name} shares its weight with another layer (tied embeddings), so an adapter could not "
                "be merged. Leave it out."
            )
    return chosen
