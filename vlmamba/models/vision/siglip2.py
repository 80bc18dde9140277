"""SigLIP 2 (arXiv 2502.14786): fixed-resolution checkpoints and the flexible-resolution (NaFlex) ones.

Fixed-resolution checkpoints are of SigLIP's architecture (model type "siglip"). NaFlex checkpoints (model
type "siglip2") read patches; here square images of one size are cut into patches inside the tower, so no
padding and no mask is needed.

Shapes: B batch, C channels, S image side, P patch side, H W patch grid, V = H * W, D feature width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from vlmamba.models.vision.base import HALF, resize_positions
from vlmamba.models.vision.siglip import SiglipEncoder

_NAFLEX = "siglip2_vision_model"


class Siglip2Encoder(SiglipEncoder):
    """SigLIP 2's vision tower through transformers' SiglipVisionModel or Siglip2VisionModel, as the
    checkpoint says.
    """

    family = "siglip2"
    checkpoint_types: ClassVar = {
        **SiglipEncoder.checkpoint_types,
        _NAFLEX: _NAFLEX,
        "siglip2": _NAFLEX,
    }
    # google/siglip2-so400m-patch14-384, preprocessor_config.json: resample 2 (bilinear)
    default_image: ClassVar = {"mode": "resize", "mean": HALF, "std": HALF, "resample": "bilinear"}

    @classmethod
    def fields_of(cls, model_type: str) -> tuple[str, ...]:
        """See `TransformersEncoder.fields_of`."""
        if model_type != _NAFLEX:
            return cls.fields
        return tuple("num_patches" if field == "image_size" else field for field in cls.fields)

    @classmethod
    def classes(cls, model_type: str) -> tuple[Any, Any]:
        """See `TransformersEncoder.classes`."""
        if model_type != _NAFLEX:
            return super().classes(model_type)
        from transformers import Siglip2VisionConfig, Siglip2VisionModel

        return Siglip2VisionConfig, Siglip2VisionModel

    @classmethod
    def native_size(cls, config: Any) -> int:
        """See `TransformersEncoder.native_size`; NaFlex: the side of the square its position table fills."""
        if config.model_type != _NAFLEX:
            return super().native_size(config)
        return round(config.num_patches**0.5) * int(config.patch_size)

    @classmethod
    def set_native_size(cls, config: Any, image_size: int) -> None:
        """See `TransformersEncoder.set_native_size`."""
        if config.model_type != _NAFLEX:
            super().set_native_size(config, image_size)
        else:
            config.num_patches = (image_size // int(config.patch_size)) ** 2

    def resize(self, grid: tuple[int, int]) -> None:
        """SigLIP's rule, or NaFlex's own: bilinear and antialiased."""
        if self.full_config.model_type != _NAFLEX:
            super().resize(grid)
            return
        embeddings = self.body.embeddings
        old = embeddings.position_embedding.weight.detach()
        table = resize_positions(old, grid, mode="bilinear", antialias=True)
        embeddings.position_embedding = nn.Embedding.from_pretrained(table, freeze=False)
        embeddings.num_patches = self.num_tokens
        embeddings.position_embedding_size = grid[0]

    def run(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See `TransformersEncoder.run`."""
        if self.full_config.model_type != _NAFLEX:
            return super().run(pixel_values)
        body = self.body
        patches = to_patches(pixel_values, int(self.full_config.patch_size), self.grid)
        embedded = body.embeddings.patch_embedding(patches) + body.embeddings.position_embedding.weight
        hidden = body.encoder(inputs_embeds=embedded).last_hidden_state
        return getattr(body, self.norm_name)(hidden)


def to_patches(pixel_values: torch.Tensor, patch: int, grid: tuple[int, int]) -> torch.Tensor:
    """(B, C, S, S) to (B, V, P * P * C) in raster order, channels innermost as NaFlex's image processor has
    them.
    """
    batch, channels = pixel_values.shape[:2]
    height, width = grid
    whole = pixel_values[:, :, : height * patch, : width * patch]
    cut = whole.reshape(batch, channels, height, patch, width, patch).permute(0, 2, 4, 3, 5, 1)
    return cut.reshape(batch, height * width, patch * patch * channels)
