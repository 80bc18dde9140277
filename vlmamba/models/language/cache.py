"""The decoding cache in the form transformers' `generate` handles, and the handling of padded rows.

Shapes: B batch, L length, D model width.

A Mamba layer's past is two tensors of fixed size, so the cache is small and does not grow; it can be
reordered for beams and continued with any number of tokens, but not cropped.

Padding is handled by moving it: a causal model is not influenced by what comes later, so every row's real
tokens are moved to its front (order kept), the model runs, the state after each row's last real token is
kept, and the outputs go back to their places. That is exact for left, right and inner padding, with and
without an earlier state, and every row sees the very same chunks of the scan as it would alone.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vlmamba.errors import ShapeError
from vlmamba.models.language.decode import DecodeStep, GraphedStep, steppable
from vlmamba.ssm.state import MambaState

if TYPE_CHECKING:
    from transformers import MambaConfig

    from vlmamba.models.language.blocks import MambaBackbone


class MambaCache:
    """States of all Mamba layers, with the methods `generate` calls on a cache.

    Created empty; the first forward pass allocates it for its batch size, device and dtype. The `state` is
    None until then.

    Args:
        cuda_graphs: Record the decoding step as a CUDA graph and replay it (`vlmamba.models.language.decode`).
    """

    is_compileable = False
    is_croppable = False
    is_linear = (
        False,
    )  # it knows how many columns it has seen, which `generate` asks caches of keys alone for

    def __init__(self, *, cuda_graphs: bool = False) -> None:
        self.state: MambaState | None = None
        self.cuda_graphs = cuda_graphs
        self._columns = 0
        self._is_user_defined = False
        self._step: DecodeStep | GraphedStep | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns seen (padding included), the same for all layers."""
        return self._columns

    @property
    def is_initialized(self) -> bool:
        """Whether states are allocated."""
        return self.state is not None

    def start(
        self, config: MambaConfig, batch: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> MambaState:
        """The states for a batch of this size, allocated (zero) on first use.

        Raises:
            ShapeError: The cache was filled with another batch size.
        """
        if self.state is None:
            self.state = MambaState.allocate(
                config.num_hidden_layers,
                batch,
                config.intermediate_size,
                config.state_size,
                config.conv_kernel,
                dtype=dtype,
                device=device,
            )
        held = self.state.layers[0].ssm.shape[0]
        if held != batch:
            raise ShapeError(
                f"the cache holds states of {held} rows but the input has {batch} rows; "
                "pass a fresh cache, or repeat or select its rows first (batch_repeat_interleave, "
                "batch_select_indices)"
            )
        return self.state

    def decode(self, backbone: MambaBackbone, hidden: torch.Tensor) -> torch.Tensor | None:
        """One token a row through all blocks, in place, without gradients.

        Args:
            backbone: The blocks whose states these are.
            hidden: (B, D) embedded tokens.

        Returns:
            (B, D) normed hidden states; None, with nothing done, where somebody hooked into the blocks, so that
            they have to be called as modules.

        Raises:
            ConfigError: `cuda_graphs` is set and cannot be had.
        """
        assert self.state is not None
        if self._step is None or not self._step.serves(self.state):
            if self.cuda_graphs:
                self._step, give_back = backbone.graphs.take(backbone, self.state)
                self.state = self._step.state
                weakref.finalize(self, give_back)
            elif steppable(backbone):
                self._step = DecodeStep(backbone, self.state)
            else:
                return None
        return self._step(hidden)

    def advance(self, columns: int) -> None:
        """Count columns that have been run through the model."""
        self._columns += columns

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let row i continue from what was row ``beam_idx[i]``."""
        if self.state is not None:
            self.state.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, in place."""
        if self.state is not None:
            self.state.repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows only."""
        if self.state is not None:
            self.state = self.state.select(indices)

    def clone(self) -> MambaCache:
        """An independent copy, e.g. of a prompt that many continuations share."""
        copy = MambaCache(cuda_graphs=self.cuda_graphs)
        copy.state = None if self.state is None else self.state.clone()
        copy._columns = self._columns
        return copy

    def reset(self) -> None:
        """Forget everything, keep the buffers."""
        if self.state is not None:
            self.state.reset()
        self._columns = 0

    def crop(self, max_length: int) -> None:
        """Not possible for a state-space model.

        Raises:
            ShapeError: Always, unless nothing would be removed.
        """
        if max_length < 0 or max_length < self._columns:
            raise ShapeError(
                f"a Mamba state of {self._columns} tokens cannot be cropped to {max_length}: it keeps no "
                "history. Keep a clone() of the cache at the place you want to return to."
            )


@dataclass(frozen=True)
class RealFirst:
    """Where padded columns go so that every row starts with its real tokens.

    Attributes:
        order: (B, L) column taken to each place.
        inverse: (B, L) place each column went to.
        counts: (B,) number of real tokens per row.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def from_mask(cls, attention_mask: torch.Tensor, length: int) -> RealFirst:
        """Build from a (B, >= length) mask whose last `length` columns belong to the input.

        Raises:
            ShapeError: The mask is not two-dimensional or shorter than the input.
        """
        if attention_mask.dim() != 2 or attention_mask.shape[1] < length:
            raise ShapeError(
                f"attention_mask has shape {tuple(attention_mask.shape)} but must be (batch, length) with "
                f"length at least {length}, the number of input tokens. Packed rows are described by "
                "seq_idx, not by a mask."
            )
        padded = attention_mask[:, -length:] == 0
        order = torch.argsort(padded.to(torch.int8), dim=1, stable=True)
        inverse = torch.argsort(order, dim=1)
        return cls(order, inverse, (~padded).sum(dim=1))

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """Move real tokens of (B, L) or (B, L, D) to the front."""
        return _take(values, self.order)

    def undo(self, values: torch.Tensor) -> torch.Tensor:
        """Put columns back to their places."""
        return _take(values, self.inverse)

    def last(self) -> torch.Tensor:
        """(B,) index of the last real token after `apply`; 0 for a row without any."""
        return (self.counts - 1).clamp(min=0)


def keep_rows_without_tokens(new: MambaState, old: MambaState | None, counts: torch.Tensor) -> None:
    """Rows that got only padding keep the state they had (zeros when there was none).

    Args:
        new: State after the pass; changed in place.
        old: A clone of the state before the pass, None for a fresh one.
        counts: (B,) real tokens per row.
    """
    idle = (counts == 0)[:, None, None]
    for index, layer in enumerate(new.layers):
        if old is None:
            layer.conv.masked_fill_(idle, 0)
            layer.ssm.masked_fill_(idle, 0)
        else:
            layer.conv.copy_(torch.where(idle, old.layers[index].conv, layer.conv))
            layer.ssm.copy_(torch.where(idle, old.layers[index].ssm, layer.ssm))


def _take(values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    if values.dim() == 2:
        return values.gather(1, columns)
    return values.gather(1, columns[..., None].expand(-1, -1, values.shape[-1]))
