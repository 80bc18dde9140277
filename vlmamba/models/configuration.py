"""VLMambaConfig: everything that rebuilds a vision-language model."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from vlmamba.errors import ConfigError
from vlmamba.models.language.families import FAMILIES, OWN_FAMILY


class VLMambaConfig(PreTrainedConfig):
    """Config of an encoder, a connector, a language model and the image token between them.

    Args:
        vision_config: The encoder, as `vlmamba.models.vision.build_vision_encoder` takes it: ``family``,
            ``feature_layer`` and the family's own config. A fused encoder holds several.
        connector_config: ``{"name", "options"}`` of the connector.
        text_config: Config of the language model (transformers', or its dict with ``model_type``).
        image_token_id: Placeholder id that stands for one visual token.
        **kwargs: Fields of `PreTrainedConfig`.

    Raises:
        ConfigError: A part is described by something else than a mapping.
    """

    model_type = "vlmamba"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 - transformers' own attribute
    has_no_defaults_at_init = True
    # No code comes with a checkpoint; TRL looks here for it.
    auto_map: ClassVar[Mapping[str, str]] = MappingProxyType({})
    # What a Trainer's evaluation does not gather; it wants a list.
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vision_config: Mapping[str, Any] | None = None,
        connector_config: Mapping[str, Any] | None = None,
        text_config: PreTrainedConfig | Mapping[str, Any] | None = None,
        image_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        for name, value in (("vision_config", vision_config), ("connector_config", connector_config)):
            if value is not None and not isinstance(value, Mapping):
                raise ConfigError(f"{name} must be a mapping, got {type(value).__name__}")
        self.vision_config = dict(vision_config or {})
        self.connector_config = dict(connector_config or {})
        if isinstance(text_config, Mapping):
            fields = dict(text_config)
            model_type = fields.pop("model_type", None)
            if model_type is None:
                raise ConfigError(
                    "text_config has no model_type: which language model it describes is not known"
                )
            if fields.get(OWN_FAMILY) is not None:
                FAMILIES.get(fields[OWN_FAMILY])  # its module may register the type with transformers
            text_config = AutoConfig.for_model(model_type, **fields)
        self.text_config: Any = text_config
        self.image_token_id = image_token_id
        if text_config is not None:
            kwargs.setdefault("tie_word_embeddings", bool(getattr(text_config, "tie_word_embeddings", False)))
            for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
                kwargs.setdefault(name, getattr(text_config, name))
            # transformers' constructor hands these on to the language model's config, which a ready model shares:
            # None would take its causal mask away.
            for name in ("attn_implementation", "experts_implementation"):
                kwargs.setdefault(name, getattr(text_config, f"_{name}", None))
        super().__init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The language model's config, in which transformers looks for sizes."""
        return self.text_config if self.text_config is not None else self
