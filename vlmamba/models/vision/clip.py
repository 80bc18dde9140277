"""CLIP (arXiv 2103.00020): one class token comes first and is dropped.

CLIP-ViT-L/14 at 336 px gives 24 x 24 = 576 tokens.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from vlmamba.models.vision.base import CLIP_MEAN, CLIP_STD, resize_positions
from vlmamba.models.vision.siglip import SiglipEncoder, set_position_table
from vlmamba.models.vision.transformers_tower import TransformersEncoder


class ClipEncoder(TransformersEncoder):
    """CLIP's vision tower through transformers' CLIPVisionModel.

    Its hidden state 0 is taken after the layer norm that precedes the first block, as in transformers.
    """

    family = "clip"
    checkpoint_types: ClassVar = {
        "clip_vision_model": "clip_vision_model",
        "clip": "clip_vision_model",
    }
    fields = (*SiglipEncoder.fields, "initializer_range", "initializer_factor")
    norm_name = "post_layernorm"
    norm_in_output = False
    # openai/clip-vit-large-patch14-336, preprocessor_config.json
    default_image: ClassVar = {"mode": "crop", "mean": CLIP_MEAN, "std": CLIP_STD, "resample": "bicubic"}

    @classmethod
    def classes(cls, model_type: str) -> tuple[Any, Any]:
        """See `TransformersEncoder.classes`."""
        from transformers import CLIPVisionConfig, CLIPVisionModel

        return CLIPVisionConfig, CLIPVisionModel

    def prefix_tokens(self) -> int:
        """The class token."""
        return 1

    def resize(self, grid: tuple[int, int]) -> None:
        """As transformers' interpolate_pos_encoding: bicubic, no antialiasing, the class token's kept."""
        embeddings = self.body.embeddings
        old = embeddings.position_embedding.weight.detach()
        patches = resize_positions(old[1:], grid, mode="bicubic", antialias=False)
        set_position_table(embeddings, torch.cat([old[:1], patches]), self.image_size)
