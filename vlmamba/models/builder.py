"""From a recipe's model settings to a model and its processor.

The encoder and the language model come from where they were downloaded to (or, for a dry run, from their configs
alone, on the meta device); the connector starts fresh.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from vlmamba.common.digests import check_folder
from vlmamba.config import Config, Later
from vlmamba.errors import CheckpointError, MissingFileError
from vlmamba.models.chat import load_template
from vlmamba.models.configuration import VLMambaConfig
from vlmamba.models.connectors import CONNECTORS, Connector, build_connector
from vlmamba.models.connectors.base import check_options
from vlmamba.models.image_processing import VLMambaImageProcessor
from vlmamba.models.language import (
    build_language_model,
    ensure_token_fits,
    load_language_model,
    load_tokenizer,
    read_config,
)
from vlmamba.models.language.causality import check_causal
from vlmamba.models.language.families import FAMILIES
from vlmamba.models.language.loading import resolve_directory
from vlmamba.models.language.weights import load_state_dict_file
from vlmamba.models.modeling import VLMambaForConditionalGeneration
from vlmamba.models.processing import VLMambaProcessor, check_tokenizer
from vlmamba.models.vision import VisionEncoder, build_vision_encoder, encoders, load_vision_encoder
from vlmamba.models.vision.presets import preset_config
from vlmamba.registry import is_admitted

log = logging.getLogger(__name__)

CONNECTOR_FILE = "connector.safetensors"
CONNECTOR_CONFIG_FILE = "connector_config.json"


class VisionConfig(Config):
    """The encoder."""

    family: str
    """Encoder family: siglip, siglip2, clip, dinov2, open_clip, fused, or package.module:Class."""
    path: str | tuple[str, ...]
    """Directory or hub id of the weights; for a fused encoder one "family=path" for each tower."""
    feature_layer: int = -2
    """Hidden state to use: -2 is the output of the second-to-last block (as in LLaVA)."""
    final_norm: bool = False
    """Apply the tower's final layer norm to the features."""
    image_size: int | None = None
    """Side of the square input in pixels; the checkpoint's own when left out."""
    preset: str | None = None
    """Name of the published sizes (vlmamba.models.vision.presets), for a dry run without the weights."""
    hint: str = ""
    """Where to get the weights, shown when they are missing."""

    def __post_init__(self) -> None:
        """Check the family's name; that of a part from outside when it is built."""
        if ":" not in self.family or is_admitted(self.family):
            encoders.get(self.family)


class ConnectorConfig(Config):
    """The connector."""

    name: str = "vss-l2"
    """mlp, vss-mlp, vss-l2, qmamba, or package.module:Class of your own."""
    options: dict[str, Any] = {}  # noqa: RUF012 - Config copies defaults
    """The connector's own options (scan, num_queries, depth, ...)."""
    init: dict[str, str] = {}  # noqa: RUF012
    """Parts that start from other weights: part name -> run, export or model directory ("pre", "layers")."""

    def __post_init__(self) -> None:
        """Check name and options; those of a part from outside that may not be imported here when it is built."""
        if ":" not in self.name or is_admitted(self.name):
            check_options(self.name, CONNECTORS.get(self.name), self.options)


class LanguageConfig(Config):
    """The language model."""

    path: str
    """Directory or hub id of the weights."""
    tokenizer: str | None = None
    """Directory or hub id of the tokenizer; the model's own directory when left out."""
    attention: Later[Literal["sdpa", "eager", "flash_attention_2"] | None] = None
    """How a language model with attention computes it; transformers' choice when left out."""
    family: Later[str | None] = None
    """package.module:function of a family of your own; chosen by the config's model_type when left out."""
    preset: str | None = None
    """Size of a published Mamba ("2.8b"), for a dry run without the weights."""
    hint: str = ""
    """Where to get the weights, shown when they are missing."""

    def __post_init__(self) -> None:
        """Import a family of the user's own that may be imported here; another one when it is built."""
        if self.family is not None and is_admitted(self.family):
            FAMILIES.get(self.family)


class ImageConfig(Config):
    """How images are made square."""

    mode: Literal["pad", "resize", "crop"] | None = None
    """pad (to a square, mean colour), resize, or crop; the encoder's default when left out."""
    exif_transpose: bool = False
    """Turn photos as their EXIF data says (off, as in LLaVA)."""


class ModelConfig(Config):
    """Encoder, connector, language model, chat template, image settings."""

    vision: VisionConfig
    """The encoder."""
    language: LanguageConfig
    """The language model."""
    connector: ConnectorConfig = ConnectorConfig()
    """The connector."""
    chat: str = "vicuna_v1"
    """Chat template: cobra, mamba, plain, vicuna_v1, zephyr, or a file of your own, my/template.jinja."""
    image: ImageConfig = ImageConfig()
    """Image settings."""

    def __post_init__(self) -> None:
        """Check the template's name; a file of the user's is read when it is wanted."""
        if not self.chat.endswith(".jinja"):
            load_template(self.chat)


def build_model(config: ModelConfig) -> tuple[VLMambaForConditionalGeneration, VLMambaProcessor]:
    """Load encoder and language model, make a fresh connector, and join them.

    Raises:
        MissingFileError: Weights or tokenizer are not there.
        CheckpointError: They do not fit.
        ConfigError: The language model cannot be used exactly, or sees what comes later.
    """
    vision, words = _load_encoder(config.vision), config.language
    attention = {} if words.attention is None else {"attn_implementation": words.attention}
    language = load_language_model(words.path, torch.float32, family=words.family, **attention)
    tokenizer = load_tokenizer(words.tokenizer or words.path)
    check_tokenizer(tokenizer, words.tokenizer or words.path)
    connector = _fresh_connector(config.connector, vision, language.config)
    for part, path in config.connector.init.items():
        connector.load_part(part, _part_weights(part, path))
    settings = {**vision.image_defaults(), "exif_transpose": config.image.exif_transpose}
    if config.image.mode is not None:
        settings["mode"] = config.image.mode
    processor = VLMambaProcessor(
        VLMambaImageProcessor(**settings),
        tokenizer,
        chat_template=load_template(config.chat),
        num_image_tokens=connector.num_tokens,
    )
    ensure_token_fits(language, processor.image_token_id)
    model = _join(vision.config_dict(), vision, connector, language, processor.image_token_id)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.pad_token_id
    check_causal(model.language_model)
    return model, processor


def build_meta_model(config: ModelConfig) -> VLMambaForConditionalGeneration:
    """The full-size model without any weights, for counting parameters and tokens.

    Sizes come from the config files where they are, else from the presets the recipe names.
    """
    vision_config = _meta_vision_config(config.vision)
    text_config = _meta_text_config(config.language)
    with torch.device("meta"):
        vision = build_vision_encoder(vision_config)
        language = build_language_model(text_config)
        connector = _fresh_connector(config.connector, vision, text_config)
        return _join(vision_config, vision, connector, language, text_config.vocab_size - 1)


def _fresh_connector(config: ConnectorConfig, vision: VisionEncoder, text_config: Any) -> Connector:
    sizes = {"vision_dim": vision.hidden_size, "text_dim": text_config.hidden_size, "grid": vision.grid}
    return build_connector(config.name, **sizes, **config.options)


def _join(
    vision_config: Mapping[str, Any],
    vision: VisionEncoder,
    connector: Connector,
    language: Any,
    image_token_id: int,
) -> VLMambaForConditionalGeneration:
    config = VLMambaConfig(
        vision_config=vision_config,
        connector_config={"name": connector.name, "options": dict(connector.options)},
        text_config=language.config,
        image_token_id=image_token_id,
    )
    return VLMambaForConditionalGeneration(
        config, vision_tower=vision, multi_modal_projector=connector, language_model=language
    )


def _load_encoder(config: VisionConfig) -> VisionEncoder:
    path = config.path if isinstance(config.path, str) or config.family != "fused" else ",".join(config.path)
    return load_vision_encoder(config.family, path, **_selection(config))


def _selection(config: VisionConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("feature_layer", "image_size", "final_norm")}


def _meta_vision_config(config: VisionConfig) -> dict[str, Any]:
    towers = [config.path] if isinstance(config.path, str) else list(config.path)
    there = all(Path(tower.rpartition("=")[2]).is_dir() for tower in towers)
    if config.preset is not None and not there:
        return preset_config(config.preset, **_selection(config))
    return _load_encoder(config).config_dict()


def _meta_text_config(config: LanguageConfig) -> Any:
    try:
        return read_config(resolve_directory(config.path, local_files_only=True), config.family)
    except (MissingFileError, CheckpointError):
        if config.preset is None:
            raise
    from vlmamba.models.language.sizes import mamba_config

    return mamba_config(config.preset)


def _part_weights(part: str, path: str) -> dict[str, torch.Tensor]:
    """Weights a connector's part starts from: a saved connector, or a language model's."""
    for candidate in (Path(path), Path(path) / CONNECTOR_FILE, Path(path) / "export" / CONNECTOR_FILE):
        if candidate.is_file():
            check_folder(candidate.parent, [candidate.name])
            return load_state_dict_file(candidate)
    if part == "layers":
        return dict(load_language_model(path, torch.float32).state_dict())
    raise MissingFileError(
        f"model.connector.init.{part}: no {CONNECTOR_FILE} at {path} or {path}/export; give a finished run or its "
        "export"
    )
