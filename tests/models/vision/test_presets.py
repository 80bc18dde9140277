"""Full-size encoders on the meta device: token counts, parameter counts, no memory."""

from __future__ import annotations

import pytest
import torch

from vlmamba.errors import ConfigError
from vlmamba.models.vision import build_vision_encoder
from vlmamba.models.vision.presets import PRESETS, preset_config


def block(width: int, hidden: int, *, scale: int = 0) -> int:
    """Parameters of a transformer block: attention, MLP, two norms (and layer scale)."""
    return 4 * (width * width + width) + 2 * width * hidden + hidden + width + 4 * width + scale * width


SO400M = 14 * 14 * 3 * 1152 + 1152 + 729 * 1152 + 26 * block(1152, 4304)
CLIP_L = 14 * 14 * 3 * 1024 + 1024 + 577 * 1024 + 2 * 1024 + 23 * block(1024, 4096)
DINO_L = 14 * 14 * 3 * 1024 + 1024 + 1024 + 1370 * 1024 + 23 * block(1024, 4096, scale=2)


@pytest.mark.parametrize(
    ("name", "grid", "width", "parameters"),
    [
        ("siglip-so400m-patch14-384", 27, 1152, SO400M),
        ("siglip2-so400m-patch14-384", 27, 1152, SO400M),
        ("clip-vit-large-patch14-336", 24, 1024, CLIP_L),
        ("dinov2-large", 37, 1024, DINO_L),
        ("dinov2-with-registers-large", 37, 1024, DINO_L + 4 * 1024),
    ],
)
def test_full_size_encoders_need_no_memory(name: str, grid: int, width: int, parameters: int) -> None:
    with torch.device("meta"):
        encoder = build_vision_encoder(preset_config(name))
    assert all(p.is_meta for p in encoder.parameters())
    assert encoder.grid == (grid, grid) and encoder.num_tokens == grid * grid
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    side = encoder.image_size
    assert encoder(torch.empty(1, 3, side, side, device="meta")).shape == (1, grid * grid, width)


def test_siglip_so400m_has_729_tokens_and_428_million_parameters_in_all() -> None:
    with torch.device("meta"):
        encoder = build_vision_encoder(
            preset_config("siglip-so400m-patch14-384", feature_layer=-1, final_norm=True)
        )
    assert encoder.num_tokens == 729
    # the pooling head that is left out: attention, MLP, one norm and the probe
    head = block(1152, 4304) - 2 * 1152 + 1152
    assert sum(p.numel() for p in encoder.parameters()) + head == 428_225_600


def test_cobras_pair_at_384_pixels() -> None:
    """DINOv2 at 384 px has a 27 x 27 grid too: floor(384 / 14) = 27."""
    with torch.device("meta"):
        encoder = build_vision_encoder(preset_config("dinov2-with-registers-large+siglip-so400m-patch14-384"))
    assert encoder.image_size == 384 and encoder.grid == (27, 27)
    assert encoder.num_channels == 6 and encoder.hidden_size == 1024 + 1152
    assert encoder(torch.empty(2, 6, 384, 384, device="meta")).shape == (2, 729, 2176)
    assert encoder.image_defaults() == {
        "size": 384,
        "mode": "resize",
        "mean": [0.485, 0.456, 0.406, 0.5, 0.5, 0.5],
        "std": [0.229, 0.224, 0.225, 0.5, 0.5, 0.5],
        "resample": "bicubic",
    }


def test_preset_config_is_a_copy_and_rebuilds() -> None:
    config = preset_config("siglip2-so400m-patch16-naflex", feature_layer=-1)
    config["config"]["hidden_size"] = 1
    assert PRESETS["siglip2-so400m-patch16-naflex"].config["hidden_size"] == 1152
    with torch.device("meta"):
        encoder = build_vision_encoder(preset_config("siglip2-so400m-patch16-naflex", image_size=384))
        assert encoder.grid == (24, 24)
        assert build_vision_encoder(encoder.config_dict()).config_dict() == encoder.config_dict()


def test_unknown_preset_names_close_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown encoder preset 'dinov2-big'. Did you mean 'dinov2-large'"
    ):
        preset_config("dinov2-big")
