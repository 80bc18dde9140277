"""SigLIP (arXiv 2303.15343): no class token, every output token is a patch.

SigLIP-SO400M/14 at 384 px gives 27 x 27 = 729 tokens.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from vlmamba.models.vision.base import HALF, resize_positions
from vlmamba.models.vision.transformers_tower import TransformersEncoder


class SiglipEncoder(TransformersEncoder):
    """SigLIP's vision tower through transformers' SiglipVisionModel."""

    family = "siglip"
    checkpoint_types: ClassVar = {
        "siglip_vision_model": "siglip_vision_model",
        "siglip": "siglip_vision_model",
    }
    fields = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_channels",
        "image_size",
        "patch_size",
        "hidden_act",
        "layer_norm_eps",
        "attention_dropout",
    )
    norm_name = "post_layernorm"
    # google/siglip-so400m-patch14-384, preprocessor_config.json: resample 3 (bicubic), mean and std 0.5
    default_image: ClassVar = {"mode": "resize", "mean": HALF, "std": HALF, "resample": "bicubic"}

    @classmethod
    def classes(cls, model_type: str) -> tuple[Any, Any]:
        """See `TransformersEncoder.classes`."""
        from transformers import SiglipVisionConfig, SiglipVisionModel

        return SiglipVisionConfig, SiglipVisionModel

    @classmethod
    def unused(cls, config: Any) -> dict[str, Any]:
        """No attention-pooling head."""
        return {"vision_use_head": False}

    def prefix_tokens(self) -> int:
        """None: the first output token is the first patch."""
        return 0

    def resize(self, grid: tuple[int, int]) -> None:
        """As transformers' interpolate_pos_encoding: bicubic, no antialiasing."""
        embeddings = self.body.embeddings
        old = embeddings.position_embedding.weight
        table = resize_positions(old.detach(), grid, mode="bicubic", antialias=False)
        set_position_table(embeddings, table, self.image_size)


def set_position_table(embeddings: Any, table: torch.Tensor, image_size: int) -> None:
    """Replace the position table of transformers' SigLIP or CLIP embeddings by a (tokens, D) one."""
    embeddings.position_embedding = nn.Embedding.from_pretrained(table, freeze=False)
    embeddings.num_positions = table.shape[0]
    embeddings.num_patches = (image_size // embeddings.patch_size) ** 2
    embeddings.image_size = image_size
    embeddings.position_ids = torch.arange(table.shape[0], device=table.device).expand((1, -1))
