"""What every vision encoder is: frozen-aware, grid-true, rebuilt from a plain dictionary.

Shapes: B batch, C channels, S image side in pixels, H W patch grid, V = H * W visual tokens, D feature width.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import nn

from vlmamba.errors import ConfigError, ShapeError
from vlmamba.registry import close_matches

COMMON_KEYS = ("family", "feature_layer", "final_norm", "image_size", "config", "image")
IMAGE_KEYS = ("mode", "mean", "std", "resample")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Selection:
    """What of a checkpoint is loaded, and how; the arguments of `vlmamba.models.vision.load_vision_encoder`."""

    feature_layer: int = -2
    image_size: int | None = None
    final_norm: bool = False
    dtype: torch.dtype | None = None


class VisionEncoder(nn.Module, abc.ABC):
    """Images to patch features, one feature per patch of a grid, in raster order.

    Class and register tokens never leave an encoder. When none of its parameters requires a gradient, the
    encoder runs under `torch.no_grad` and stays in eval mode whatever its parent does. Input is cast to the
    parameters' dtype, and features come out in it.

    Attributes:
        family: Registered name of the family.
        hidden_size: Width D of the features.
        grid: (H, W), patches per column and per row.
        image_size: Side S of the square input.
        num_channels: Channels of the input: 3, or 3 * n for n fused encoders.
        feature_layer: Selected layer, an index into the hidden states (0 = embeddings, -1 = last block).
        final_norm: Whether the tower's final layer norm is applied to the selected features.
        default_image: The family's image settings, without the size.
        image: What the checkpoint's say differently.
    """

    family: ClassVar[str]
    default_image: ClassVar[Mapping[str, Any]] = {}
    image: Mapping[str, Any]
    hidden_size: int
    grid: tuple[int, int]
    image_size: int
    num_channels: int = 3
    feature_layer: int
    final_norm: bool

    @classmethod
    @abc.abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> VisionEncoder:
        """Random initialisation from what `config_dict` gives."""

    @classmethod
    @abc.abstractmethod
    def from_pretrained(cls, path: Any, wanted: Selection) -> VisionEncoder:
        """Pre-trained weights; see `vlmamba.models.vision.load_vision_encoder`."""

    def architecture(self) -> dict[str, Any]:
        """Settings of the whole tower: the entry ``config`` of `config_dict`."""
        raise NotImplementedError(f"{type(self).__name__} describes itself by config_dict alone")

    def config_dict(self) -> dict[str, Any]:
        """Plain, JSON-able dictionary from which `build_vision_encoder` rebuilds the same modules."""
        result: dict[str, Any] = {
            "family": self.family,
            "feature_layer": self.feature_layer,
            "final_norm": self.final_norm,
            "image_size": self.image_size,
            "config": self.architecture(),
        }
        return result | ({"image": dict(self.image)} if self.image else {})

    def image_defaults(self) -> dict[str, Any]:
        """Image settings the encoder was trained with: size, mode, mean, std, resample (arguments of the
        image processor).
        """
        chosen = {key: {**self.default_image, **self.image}[key] for key in IMAGE_KEYS}
        return {
            "size": self.image_size,
            **{key: list(value) if isinstance(value, tuple) else value for key, value in chosen.items()},
        }

    @abc.abstractmethod
    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, S, S) in the parameters' dtype to (B, H * W, D); called by `forward`."""

    @abc.abstractmethod
    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute activations in the backward pass of a trainable tower (acts in training mode only)."""

    @property
    def num_tokens(self) -> int:
        """Number of features per image, H * W."""
        return self.grid[0] * self.grid[1]

    @property
    def frozen(self) -> bool:
        """True when no parameter requires a gradient."""
        return not any(p.requires_grad for p in self.parameters())

    def train(self, mode: bool = True) -> VisionEncoder:
        """Set training mode; a frozen encoder stays in eval mode."""
        super().train(mode and not self.frozen)
        return self

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode images.

        Args:
            pixel_values: (B, num_channels, image_size, image_size), normalised.

        Returns:
            (B, H * W, hidden_size) in the parameters' dtype.

        Raises:
            ShapeError: The input is not of that shape.
        """
        expected = (self.num_channels, self.image_size, self.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ShapeError(
                f"the {self.family} encoder takes pixel_values of shape (B, {', '.join(map(str, expected))}) but got "
                f"{tuple(pixel_values.shape)}. Give the image processor size={self.image_size} and "
                f"{self.num_channels} means (encoder.image_defaults()), or load the encoder with another image_size."
            )
        dtype = next(self.parameters()).dtype
        if self.frozen:
            if self.training:
                self.eval()
            with torch.no_grad():
                return self.features(pixel_values.to(dtype)).to(dtype)
        return self.features(pixel_values.to(dtype)).to(dtype)


@lru_cache(maxsize=1)
def written_by_transformers() -> frozenset[str]:
    """Keys that transformers and tools around it write into every config, and that describe no encoder."""
    from transformers import PreTrainedConfig

    tools = {"_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "attn_implementation"}
    return frozenset(
        {*PreTrainedConfig().to_dict(), *tools, "_name_or_path", "quantization_config", "torch_dtype"}
    )


def check_keys(config: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """Refuse unknown keys, but for those that transformers adds.

    Raises:
        ConfigError: A key is not in `known`; names close matches.
    """
    for key in config:
        if key not in known and key not in written_by_transformers():
            raise ConfigError(
                f"{where}: unknown key {key!r}.{close_matches(str(key), list(known))} Known: "
                f"{', '.join(known)}."
            )


def blocks_needed(feature_layer: int, num_blocks: int, where: str) -> int:
    """How many blocks must run for a feature layer.

    Hidden states are numbered as in transformers (and LLaVA's ``mm_vision_select_layer``): 0 is what enters
    the first block, k is what leaves block k, and negative numbers count from the end; so -2 is the output of
    the second-to-last block.

    Raises:
        ConfigError: Out of range.
    """
    if isinstance(feature_layer, bool) or not isinstance(feature_layer, int):
        raise ConfigError(f"{where}: feature_layer must be an integer, got {feature_layer!r}.")
    if not -(num_blocks + 1) <= feature_layer <= num_blocks:
        raise ConfigError(
            f"{where}: feature_layer {feature_layer} is out of range: the tower has {num_blocks} blocks, so it may be "
            f"{-(num_blocks + 1)} to {num_blocks} (-2 is the output of the second-to-last block, 0 the embeddings)."
        )
    return feature_layer if feature_layer >= 0 else num_blocks + 1 + feature_layer


def square_side(value: Any, name: str) -> int:
    """The side of a square: an int, or a pair of equal ints.

    Raises:
        ConfigError: The pair is not equal.
    """
    if isinstance(value, list | tuple):
        if len(set(value)) != 1:
            raise ConfigError(
                f"{name} {tuple(value)} is not square; only square images and patches are supported."
            )
        value = value[0]
    return int(value)


def patch_grid(image_size: int, patch_size: int, where: str) -> tuple[int, int]:
    """Grid of whole patches of a square image; pixels beyond the last whole patch are not seen.

    Raises:
        ConfigError: The image is smaller than one patch.
    """
    side = image_size // patch_size
    if side < 1:
        raise ConfigError(
            f"{where}: image_size {image_size} is smaller than one patch ({patch_size} pixels)."
        )
    return (side, side)


def resize_positions(
    table: torch.Tensor, grid: tuple[int, int], *, mode: str, antialias: bool
) -> torch.Tensor:
    """Interpolate a square table of position embeddings, in fp32.

    Args:
        table: (N, D) with N a square number, without class token.
        grid: The new (H, W).
        mode: "bicubic" or "bilinear".
        antialias: Low-pass when shrinking.

    Returns:
        (H * W, D) in the table's dtype.
    """
    side = round(table.shape[0] ** 0.5)
    if side * side != table.shape[0]:
        raise ShapeError(f"cannot interpolate {table.shape[0]} position embeddings: not a square grid.")
    square = table.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(
        square, size=grid, mode=mode, align_corners=False, antialias=antialias
    )
    return resized.permute(0, 2, 3, 1).reshape(grid[0] * grid[1], -1).to(table.dtype)
