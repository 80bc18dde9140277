"""transformers' pipeline "image-text-to-text", which opens pictures by itself, taught to leave that to vlmamba."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.pipelines.image_text_to_text import ImageTextToTextPipeline

from vlmamba.models.image_processing import VLMambaImageProcessor


class PicturePipeline(ImageTextToTextPipeline):
    """For other models it is transformers' own."""

    def preprocess(self, inputs: Any = None, **options: Any) -> Any:
        """As transformers', but pictures that come beside a text are opened as in training."""
        images = getattr(self.processor, "image_processor", None)
        if isinstance(images, VLMambaImageProcessor) and isinstance(inputs, Mapping) and "images" in inputs:
            inputs = {**inputs, "images": _opened(inputs["images"], images)}
        return super().preprocess(inputs, **options)


def _opened(pictures: Any, images: VLMambaImageProcessor) -> Any:
    if isinstance(pictures, list | tuple):
        return [_opened(picture, images) for picture in pictures]
    return images.open(pictures)
