"""Exact configurations of well-known full-size encoders, so that a dry run needs no download.

The values are those of the ``config.json`` of the hub repository named in each entry.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmamba.errors import ConfigError
from vlmamba.registry import close_matches


@dataclass(frozen=True)
class Preset:
    """A published checkpoint.

    Attributes:
        family: Encoder family.
        hub_id: Where the weights are.
        image_size: Side of the input it was trained with.
        config: Settings of its vision config.
    """

    family: str
    hub_id: str
    image_size: int
    config: Mapping[str, Any]


_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 384,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_DINOV2_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "mlp_ratio": 4,
    "patch_size": 14,
    "image_size": 518,
    "layer_norm_eps": 1e-6,
    "layerscale_value": 1.0,
}

PRESETS: Mapping[str, Preset] = {
    "siglip-so400m-patch14-384": Preset("siglip", "google/siglip-so400m-patch14-384", 384, _SO400M),
    "siglip2-so400m-patch14-384": Preset("siglip2", "google/siglip2-so400m-patch14-384", 384, _SO400M),
    "siglip2-so400m-patch16-naflex": Preset(
        "siglip2",
        "google/siglip2-so400m-patch16-naflex",
        256,
        {
            **{key: value for key, value in _SO400M.items() if key != "image_size"},
            "model_type": "siglip2_vision_model",
            "patch_size": 16,
            "num_patches": 256,
        },
    ),
    "clip-vit-large-patch14-336": Preset(
        "clip",
        "openai/clip-vit-large-patch14-336",
        336,
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 336,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
    ),
    "dinov2-large": Preset("dinov2", "facebook/dinov2-large", 518, _DINOV2_LARGE),
    # The tower that Cobra fuses with SigLIP (timm name vit_large_patch14_reg4_dinov2.lvd142m).
    "dinov2-with-registers-large": Preset(
        "dinov2",
        "facebook/dinov2-with-registers-large",
        518,
        {**_DINOV2_LARGE, "model_type": "dinov2_with_registers", "num_register_tokens": 4},
    ),
}

HUB_IDS: Mapping[str, str] = {name: preset.hub_id for name, preset in PRESETS.items()}
FAMILY_HUB_IDS: Mapping[str, str] = {
    "siglip": "google/siglip-so400m-patch14-384",
    "siglip2": "google/siglip2-so400m-patch14-384",
    "clip": "openai/clip-vit-large-patch14-336",
    "dinov2": "facebook/dinov2-large",
    "open_clip": "timm/ViT-SO400M-14-SigLIP-384",
}


def preset_config(
    name: str, *, feature_layer: int = -2, image_size: int | None = None, final_norm: bool = False
) -> dict[str, Any]:
    """A dictionary for `build_vision_encoder` of a full-size encoder.

    Args:
        name: A key of `PRESETS`, or several joined by "+" for a fused encoder
        ("dinov2-large+siglip-so400m-patch14-384").
        feature_layer: See `load_vision_encoder`.
        image_size: Side of the input; for several encoders the last one's by default.
        final_norm: See `load_vision_encoder`.

    Raises:
        ConfigError: Unknown name.
    """
    parts = name.split("+")
    for part in parts:
        if part not in PRESETS:
            names = sorted(PRESETS)
            raise ConfigError(
                f"unknown encoder preset {part!r}.{close_matches(part, names)} Known: {', '.join(names)}."
            )
    size = image_size or PRESETS[parts[-1]].image_size
    configs: list[dict[str, Any]] = [
        {
            "family": PRESETS[part].family,
            "feature_layer": feature_layer,
            "final_norm": final_norm,
            "image_size": size,
            "config": copy.deepcopy(dict(PRESETS[part].config)),
        }
        for part in parts
    ]
    return configs[0] if len(configs) == 1 else {"family": "fused", "encoders": configs}
