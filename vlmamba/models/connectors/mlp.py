"""MLP connector: LLaVA-1.5's two linear layers, or Cobra's three.

Shapes: B images, V patches, F vision width, D text width.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from vlmamba.errors import ConfigError
from vlmamba.models.connectors.base import Connector


class MLPConnector(Connector):
    """Linear layers with GELU between them, patch by patch.

    Sources: LLaVA-1.5 (arXiv 2310.03744, section 3.3), depth 2; VL-Mamba's ``MLP`` (arXiv 2403.13600). Cobra's fused
    projector (arXiv 2403.14520) is depth 3 with a hidden width of four times the vision width.

    Args:
        vision_dim: F.
        text_dim: D.
        grid: Rows and columns of patches.
        depth: Number of linear layers.
        hidden_dim: Width after the first layer; D when left out.
    """

    def __init__(
        self,
        *,
        vision_dim: int,
        text_dim: int,
        grid: tuple[int, int],
        depth: int = 2,
        hidden_dim: int | None = None,
    ) -> None:
        super().__init__(vision_dim=vision_dim, text_dim=text_dim, grid=grid)
        if depth < 1:
            raise ConfigError(f"connector 'mlp': depth must be at least 1, got {depth}")
        if depth == 1 and hidden_dim is not None:
            raise ConfigError(
                f"connector 'mlp': depth 1 has no hidden layer, but hidden_dim={hidden_dim} was given"
            )
        widths = [
            vision_dim,
            *([hidden_dim or text_dim] if depth > 1 else []),
            *[text_dim] * max(depth - 1, 1),
        ]
        self.depth = depth
        # Named as in transformers' LlavaMultiModalProjector.
        for index, (into, out) in enumerate(pairwise(widths), start=1):
            setattr(self, f"linear_{index}", nn.Linear(into, out))

    def project(self, features: Tensor) -> Tensor:
        """(B, V, F) -> (B, V, D)."""
        x: Tensor = self.get_submodule("linear_1")(features)
        for index in range(2, self.depth + 1):
            linear: nn.Module = getattr(self, f"linear_{index}")
            x = linear(F.gelu(x))
        return x
