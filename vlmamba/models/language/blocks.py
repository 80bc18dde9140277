"""The stack of pre-norm residual Mamba blocks, with the parameter names of transformers' Mamba.

Shapes: B batch, L length, D model width.

The arithmetic follows the Mamba paper's architecture (arXiv:2312.00752, section 3.4) and the reference model
of state-spaces/mamba (`mamba_ssm/models/mixer_seq_simple.py`): the residual stream may be kept in fp32, and
the norm reads the residual stream before it is rounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vlmamba.models.language.decode import GraphPool
from vlmamba.ssm.mixer import MambaMixer

if TYPE_CHECKING:
    from transformers import MambaConfig

    from vlmamba.ssm.state import MambaLayerState, MambaState


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32, returned in the dtype of its weight.

    Args:
        hidden_size: Width of the last dimension.
        eps: Added to the mean square.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise (..., D)."""
        normed = F.rms_norm(hidden_states.float(), self.weight.shape, self.weight.float(), self.eps)
        return normed.to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Width and eps, for printing."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class MambaBlock(GradientCheckpointingLayer):
    """``x + mixer(norm(x))``; recomputed in backward when gradient checkpointing is on."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = MambaMixer(
            config.hidden_size,
            intermediate_size=config.intermediate_size,
            state_size=config.state_size,
            conv_kernel=config.conv_kernel,
            time_step_rank=config.time_step_rank,
            use_bias=config.use_bias,
            use_conv_bias=config.use_conv_bias,
            hidden_act=config.hidden_act,
            time_step_min=config.time_step_min,
            time_step_max=config.time_step_max,
            time_step_scale=config.time_step_scale,
            time_step_floor=config.time_step_floor,
            time_step_init_scheme=config.time_step_init_scheme,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        seq_idx: torch.Tensor | None = None,
        state: MambaLayerState | None = None,
        state_at: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run one block on (B, L, D); see `MambaMixer.forward` for the other arguments."""
        residual = hidden_states.float() if self.residual_in_fp32 else hidden_states
        mixed = self.mixer(self.norm(hidden_states), seq_idx=seq_idx, state=state, state_at=state_at)
        return residual + mixed


class MambaBackbone(nn.Module):
    """Embedding, blocks and final norm (transformers calls these names `backbone.*`)."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MambaBlock(config) for _ in range(config.num_hidden_layers))
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.graphs = GraphPool()

    def blocks(self) -> list[MambaBlock]:
        """The blocks, first to last."""
        return [block for block in self.layers if isinstance(block, MambaBlock)]

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        *,
        seq_idx: torch.Tensor | None = None,
        state: MambaState | None = None,
        state_at: torch.Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """Run all blocks.

        Args:
            inputs_embeds: (B, L, D).
            seq_idx: (B, L) int32; states and convolution restart exactly where it changes.
            state: Decoding state, read as the initial state and overwritten in place.
            state_at: (B,) index of the token whose state is kept; the last one when not given.
            output_hidden_states: Also return every block's output.

        Returns:
            The normed hidden states (B, L, D), and, if asked for, the outputs of all blocks followed by the
            normed one (as transformers' MambaModel returns them).
        """
        hidden = inputs_embeds
        collected: list[torch.Tensor] = []
        for index, block in enumerate(self.layers):
            layer_state = None if state is None else state.layers[index]
            hidden = block(hidden, seq_idx=seq_idx, state=layer_state, state_at=state_at)
            if output_hidden_states:
                collected.append(hidden)
        hidden = self.norm_f(hidden)
        if not output_hidden_states:
            return hidden, None
        return hidden, (*collected, hidden)
