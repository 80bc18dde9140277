"""DINOv2 (arXiv 2304.07193), with or without registers (arXiv 2309.16588): class and register tokens are
dropped.

DINOv2-L/14 is trained at 518 px (37 x 37); at 384 px its position embeddings are interpolated to 27 x 27.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from vlmamba.models.vision.base import IMAGENET_MEAN, IMAGENET_STD, resize_positions
from vlmamba.models.vision.transformers_tower import TransformersEncoder

_REGISTERS = "dinov2_with_registers"


class Dinov2Encoder(TransformersEncoder):
    """DINOv2 through transformers' Dinov2Model and Dinov2WithRegistersModel."""

    family = "dinov2"
    checkpoint_types: ClassVar = {"dinov2": "dinov2", _REGISTERS: _REGISTERS}
    fields = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "mlp_ratio",
        "hidden_act",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "initializer_range",
        "layer_norm_eps",
        "image_size",
        "patch_size",
        "num_channels",
        "qkv_bias",
        "layerscale_value",
        "drop_path_rate",
        "use_swiglu_ffn",
    )
    norm_name = "layernorm"
    # facebook/dinov2-large, preprocessor_config.json: bicubic, centre crop, ImageNet statistics
    default_image: ClassVar = {
        "mode": "crop",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "resample": "bicubic",
    }

    @classmethod
    def fields_of(cls, model_type: str) -> tuple[str, ...]:
        """See `TransformersEncoder.fields_of`."""
        return (*cls.fields, "num_register_tokens") if model_type == _REGISTERS else cls.fields

    @classmethod
    def classes(cls, model_type: str) -> tuple[Any, Any]:
        """See `TransformersEncoder.classes`."""
        if model_type == _REGISTERS:
            from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

            return Dinov2WithRegistersConfig, Dinov2WithRegistersModel
        from transformers import Dinov2Config, Dinov2Model

        return Dinov2Config, Dinov2Model

    @classmethod
    def unused(cls, config: Any) -> dict[str, Any]:
        """No mask token (the class with registers has no switch for it)."""
        return {} if config.model_type == _REGISTERS else {"use_mask_token": False}

    def __init__(self, full: Any, model: nn.Module, **settings: Any) -> None:
        """See `TransformersEncoder.__init__`."""
        super().__init__(full, model, **settings)
        embeddings = self.body.embeddings
        token = getattr(embeddings, "mask_token", None)
        if token is not None:  # of no use here, and a parameter without gradient is an error under DDP
            del embeddings.mask_token
            embeddings.register_buffer("mask_token", token.detach(), persistent=False)

    def prefix_tokens(self) -> int:
        """The class token and the registers."""
        return 1 + int(getattr(self.full_config, "num_register_tokens", 0))

    def resize(self, grid: tuple[int, int]) -> None:
        """As transformers' interpolate_pos_encoding: bicubic; antialiased for the models with registers."""
        embeddings = self.body.embeddings
        old = embeddings.position_embeddings.detach()[0]
        antialias = self.full_config.model_type == _REGISTERS
        patches = resize_positions(old[1:], grid, mode="bicubic", antialias=antialias)
        embeddings.position_embeddings = nn.Parameter(torch.cat([old[:1], patches])[None])
        embeddings.patch_embeddings.image_size = (self.image_size, self.image_size)
        embeddings.patch_embeddings.num_patches = self.num_tokens
