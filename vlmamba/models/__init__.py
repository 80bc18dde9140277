"""Models: encoders, connectors, language models, and the vision-language model made of them.

Importing this package registers vlmamba with transformers' Auto classes (`AutoConfig`, `AutoModel`,
`AutoModelForCausalLM`, `AutoModelForImageTextToText`, `AutoImageProcessor`, `AutoProcessor`) and its pipeline.
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from vlmamba.models.configuration import VLMambaConfig
from vlmamba.models.image_processing import VLMambaImageProcessor
from vlmamba.models.modeling import VLMambaForConditionalGeneration, VLMambaModel
from vlmamba.models.pipeline import PicturePipeline
from vlmamba.models.processing import VLMambaProcessor

AutoConfig.register(VLMambaConfig.model_type, VLMambaConfig, exist_ok=True)
AutoModel.register(VLMambaConfig, VLMambaModel, exist_ok=True)
AutoModelForCausalLM.register(VLMambaConfig, VLMambaForConditionalGeneration, exist_ok=True)  # TRL's fallback
AutoModelForImageTextToText.register(VLMambaConfig, VLMambaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(VLMambaConfig, VLMambaProcessor, exist_ok=True)
AutoImageProcessor.register(
    VLMambaConfig, image_processor_classes={"pil": VLMambaImageProcessor}, exist_ok=True
)
PIPELINE_REGISTRY.supported_tasks["image-text-to-text"]["impl"] = PicturePipeline

__all__ = [
    "VLMambaConfig",
    "VLMambaForConditionalGeneration",
    "VLMambaImageProcessor",
    "VLMambaModel",
    "VLMambaProcessor",
]
