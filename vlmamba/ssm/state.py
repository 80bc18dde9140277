"""What a Mamba model remembers between calls: one convolution state and one state-space state for each layer.

Shape legend: B batch, E inner width, N state size, K conv kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class MambaLayerState:
    """The states of one layer; layers overwrite the tensors in place.

    Attributes:
        conv: The last K - 1 inputs of the convolution, oldest first, (B, K-1, E).
        ssm: The state of the recurrence, float32, (B, E, N).
    """

    conv: Tensor
    ssm: Tensor

    def index_select(self, rows: Tensor) -> MambaLayerState:
        """A copy that holds the given batch rows, (R) indices, in that order."""
        rows = rows.to(self.conv.device)
        return MambaLayerState(self.conv.index_select(0, rows), self.ssm.index_select(0, rows))

    def clone(self) -> MambaLayerState:
        """A copy."""
        return MambaLayerState(self.conv.clone(), self.ssm.clone())


class MambaState:
    """The states of all layers of a model, for a batch of rows.

    Args:
        layers: One state for each layer.
        seen_tokens: Number of tokens that went in, padding included.
    """

    def __init__(self, layers: list[MambaLayerState], seen_tokens: int = 0) -> None:
        self.layers = layers
        self.seen_tokens = seen_tokens

    @classmethod
    def allocate(
        cls,
        num_layers: int,
        batch: int,
        intermediate_size: int,
        state_size: int,
        conv_kernel: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> MambaState:
        """Zero states, as before the first token.

        Args:
            num_layers: Number of layers.
            batch: B.
            intermediate_size: E.
            state_size: N.
            conv_kernel: K.
            dtype: Dtype of the convolution states; the recurrence's are always float32.
            device: Where the states live.
        """
        layers = [
            MambaLayerState(
                conv=torch.zeros(batch, conv_kernel - 1, intermediate_size, dtype=dtype, device=device),
                ssm=torch.zeros(batch, intermediate_size, state_size, dtype=torch.float32, device=device),
            )
            for _ in range(num_layers)
        ]
        return cls(layers)

    @property
    def batch_size(self) -> int:
        """B, or 0 without layers."""
        return self.layers[0].ssm.shape[0] if self.layers else 0

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> MambaLayerState:
        return self.layers[layer]

    def __iter__(self) -> Iterator[MambaLayerState]:
        return iter(self.layers)

    def select(self, rows: Tensor) -> MambaState:
        """A new state that holds copies of the given batch rows, (R) indices, in that order."""
        return MambaState([layer.index_select(rows) for layer in self.layers], self.seen_tokens)

    def reorder(self, rows: Tensor) -> None:
        """Replace the batch rows by the given ones, (R) indices (beam search).

        The tensors stay in place when the number of rows stays the same.
        """
        for layer in self.layers:
            chosen = layer.index_select(rows)
            if chosen.ssm.shape == layer.ssm.shape:
                layer.conv.copy_(chosen.conv)
                layer.ssm.copy_(chosen.ssm)
            else:
                layer.conv, layer.ssm = chosen.conv, chosen.ssm

    def repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row `repeats` times, neighbours being equal."""
        for layer in self.layers:
            layer.conv = layer.conv.repeat_interleave(repeats, dim=0)
            layer.ssm = layer.ssm.repeat_interleave(repeats, dim=0)

    def copy_(self, other: MambaState) -> None:
        """Take over another state's values, in place."""
        self.seen_tokens = other.seen_tokens
        for own, given in zip(self.layers, other.layers, strict=True):
            own.conv.copy_(given.conv)
            own.ssm.copy_(given.ssm)

    def reset(self) -> None:
        """Forget everything, in place."""
        self.seen_tokens = 0
        for layer in self.layers:
            layer.conv.zero_()
            layer.ssm.zero_()

    def clone(self) -> MambaState:
        """A copy that shares nothing."""
        return MambaState([layer.clone() for layer in self.layers], self.seen_tokens)
