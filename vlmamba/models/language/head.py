"""The head of any causal language model of transformers: what its own forward pass does behind the last norm.

Families scale, multiply or cap their logits (gemma2, granite, cohere2, falcon_h1, ...). Rather than knowing them by
name, the model's own forward pass is run with its decoder replaced by one that returns the hidden states it is given.

Shapes: D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states (..., D) to logits (..., V)."""
    weight = model.get_output_embeddings().weight
    if weight.is_floating_point():
        hidden = hidden.to(weight.dtype)
    rows = hidden.reshape(1, -1, hidden.shape[-1])
    head = _without_decoder(model)
    # The class's own function: hooks and wrappers on the model are for its whole pass.
    output = type(head).forward(head, inputs_embeds=rows, use_cache=False, return_dict=True)
    found: torch.Tensor = output.logits
    return found.view(*hidden.shape[:-1], found.shape[-1])


def _without_decoder(model: nn.Module) -> Any:
    """A shallow copy that shares every module but the decoder, in whose place stands one that does nothing."""
    decoder = model.get_decoder()  # type: ignore[operator]
    path = next(name for name, module in model.named_modules() if module is decoder)
    top = copied = _shallow(model)
    *parents, last = path.split(".")
    for name in parents:
        copied._modules[name] = _shallow(copied._modules[name])  # type: ignore[arg-type]
        copied = copied._modules[name]  # type: ignore[assignment]
    copied._modules[last] = _Nothing()
    return top


def _shallow(module: nn.Module) -> nn.Module:
    copied: nn.Module = type(module).__new__(type(module))
    copied.__dict__ = {**module.__dict__, "_modules": dict(module._modules)}
    return copied


class _Nothing(nn.Module):
    """A decoder that gives back what it is given."""

    def forward(self, *args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> _Given:
        return _Given(inputs_embeds)


class _Given:
    """Any family's output of a decoder, of which all but the hidden states is None."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> torch.Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
