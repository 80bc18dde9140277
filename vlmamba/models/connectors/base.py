"""What every connector offers.

Shapes: B images, V = H*W patches, F vision width, T visual tokens, D text width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlmamba.errors import ConfigError, ShapeError
from vlmamba.registry import close_matches


class Connector(nn.Module):
    """Maps patch features to tokens of the language model.

    Subclasses take `vision_dim`, `text_dim`, `grid` and their own options as keyword arguments and implement
    `project`.

    Attributes:
        name: Name it was built by.
        options: Options it was built with (and `set_scan` changed), for the saved config.
        vision_dim: F, width of the patch features.
        text_dim: D, width of the language model's embeddings.
        grid: Rows and columns of patches.
    """

    name: str
    options: dict[str, Any]

    def __init__(self, *, vision_dim: int, text_dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.vision_dim = vision_dim
        self.text_dim = text_dim
        self.grid = (int(grid[0]), int(grid[1]))
        self.name = type(self).__name__
        self.options = {}

    @property
    def num_patches(self) -> int:
        """V, the patches of one image."""
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        """T, the visual tokens of one image."""
        return self.num_patches

    @property
    def blocks(self) -> nn.ModuleList | None:
        """Blocks that `project` runs one after another, however many there are; a planner runs a few of them."""
        return None

    def project(self, features: Tensor) -> Tensor:
        """(B, V, F) patch features to (B, T, D) visual tokens."""
        raise NotImplementedError(f"{type(self).__name__} does not implement project()")

    def forward(self, features: Tensor) -> Tensor:
        """(B, V, F) patch features in raster order to (B, T, D) visual tokens.

        Raises:
            ShapeError: The features are not those of this connector's grid and width.
        """
        if features.ndim != 3 or features.shape[1:] != (self.num_patches, self.vision_dim):
            raise ShapeError(
                f"connector {self.name!r} takes features of shape (images, {self.num_patches}, {self.vision_dim}) "
                f"for its {self.grid[0]} x {self.grid[1]} grid, got {tuple(features.shape)}; "
                "encoder and connector do not belong together"
            )
        return self.project(features)

    def set_scan(self, scan: str) -> None:
        """Change the scan directions, also after training.

        Raises:
            ConfigError: This connector has no scan, or no weights for these directions.
        """
        raise ConfigError(f"connector {self.name!r} has no scan to set (asked for {scan!r})")

    def set_num_queries(self, count: int) -> None:
        """Keep fewer queries, also after training; a processor of the model must be told (`num_image_tokens`).

        Raises:
            ConfigError: This connector has no queries, or not so many.
        """
        raise ConfigError(f"connector {self.name!r} has no queries to choose from (asked for {count})")

    def load_part(self, part: str, state: Mapping[str, Tensor]) -> None:
        """Initialise a named part of the connector from another model's weights.

        Raises:
            ConfigError: This connector has no such part.
        """
        raise ConfigError(f"connector {self.name!r} has no part {part!r} to initialise; it has none")


class RMSNorm(nn.Module):
    """Root-mean-square norm in fp32 (Zhang and Sennrich 2019, eq. 4), with Mamba's parameter name."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; the result keeps the input's dtype."""
        scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * scaled).to(x.dtype)


def check_options(name: str, cls: type[Connector], options: Mapping[str, Any]) -> None:
    """Refuse options that a connector does not have.

    Raises:
        ConfigError: Names the unknown option, close matches and the known ones.
    """
    known = option_names(cls)
    for option in options:
        if option not in known:
            raise ConfigError(
                f"connector {name!r} has no option {option!r}.{close_matches(option, known)} "
                f"Its options: {', '.join(known) or 'none'}."
            )


def option_names(cls: type[Connector]) -> list[str]:
    """Options of a connector class: its constructor's keyword arguments beyond the sizes."""
    fixed = {"self", "vision_dim", "text_dim", "grid"}
    return [name for name in inspect.signature(cls.__init__).parameters if name not in fixed]
