"""Fused encoders: channel concatenation, own normalisation, shared grid."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from vlmamba.errors import ConfigError, ShapeError
from vlmamba.models.image_processing import VLMambaImageProcessor
from vlmamba.models.vision import build_vision_encoder, load_vision_encoder

SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
DINO = {
    "hidden_size": 16,
    "mlp_ratio": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 42,
    "patch_size": 7,
}


@pytest.fixture
def paths(tmp_path: Path) -> tuple[str, str]:
    torch.manual_seed(0)
    dino, siglip = tmp_path / "dino", tmp_path / "siglip"
    transformers.Dinov2Model(transformers.Dinov2Config(**DINO)).save_pretrained(dino)
    transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIGLIP)).save_pretrained(siglip)
    return str(dino), str(siglip)


def test_features_are_those_of_the_parts_side_by_side(paths: tuple[str, str]) -> None:
    fused = load_vision_encoder("fused", f"dinov2={paths[0]}, siglip={paths[1]}")
    dino = load_vision_encoder("dinov2", paths[0], image_size=28)
    siglip = load_vision_encoder("siglip", paths[1])
    assert fused.image_size == 28 and fused.grid == (4, 4)
    assert fused.hidden_size == 48 and fused.num_channels == 6
    x = torch.randn(2, 6, 28, 28)
    assert torch.equal(fused(x), torch.cat([dino(x[:, :3]), siglip(x[:, 3:])], dim=-1))
    listed = [{"family": "dinov2", "path": paths[0]}, {"family": "siglip", "path": paths[1]}]
    assert torch.equal(load_vision_encoder("fused", listed)(x), fused(x))


def test_each_encoder_gets_its_own_normalisation(paths: tuple[str, str]) -> None:
    fused = load_vision_encoder("fused", f"dinov2={paths[0]},siglip={paths[1]}")
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    pixels = VLMambaImageProcessor(**fused.image_defaults())([picture])["pixel_values"]
    dino = VLMambaImageProcessor(28, "resize", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    siglip = VLMambaImageProcessor(28, "resize")
    expected = torch.cat([dino(picture)["pixel_values"], siglip(picture)["pixel_values"]], dim=1)
    assert torch.equal(pixels, expected)
    assert fused(pixels).shape == (1, 16, 48)


def test_config_dict_round_trip_freezing_and_dtype(paths: tuple[str, str]) -> None:
    fused = load_vision_encoder("fused", f"dinov2={paths[0]},siglip={paths[1]}")
    again = build_vision_encoder(json.loads(json.dumps(fused.config_dict())))
    again.load_state_dict(fused.state_dict())
    x = torch.randn(1, 6, 28, 28)
    assert torch.equal(again.eval()(x), fused.eval()(x))
    assert again.config_dict() == fused.config_dict()
    again.requires_grad_(False).to(torch.bfloat16).train()
    features = again(x)
    assert not features.requires_grad and features.dtype == torch.bfloat16
    assert not any(module.training for module in again.modules())


def test_trainable_parts_get_gradients(paths: tuple[str, str]) -> None:
    fused = load_vision_encoder("fused", f"dinov2={paths[0]},siglip={paths[1]}").train()
    fused.set_gradient_checkpointing(True)
    fused(torch.randn(1, 6, 28, 28)).sum().backward()
    assert [key for key, p in fused.named_parameters() if p.grad is None] == []


def test_grids_that_differ_are_refused_with_both() -> None:
    other = {**DINO, "patch_size": 14}
    with pytest.raises(ConfigError) as caught:
        build_vision_encoder(
            {
                "family": "fused",
                "image_size": 28,
                "encoders": [{"family": "dinov2", "config": other}, {"family": "siglip", "config": SIGLIP}],
            }
        )
    assert "dinov2 has 28 px and 2 x 2 patches, siglip has 28 px and 4 x 4" in str(caught.value)


def test_wrong_paths_and_wrong_inputs(paths: tuple[str, str]) -> None:
    with pytest.raises(
        ConfigError, match=r"as in 'dinov2=checkpoints/dinov2-large,siglip=.*; got 'somewhere'"
    ):
        load_vision_encoder("fused", "somewhere")
    with pytest.raises(ConfigError, match="unknown vision encoder 'dino'"):
        load_vision_encoder("fused", "dino=a,siglip=b")
    with pytest.raises(ConfigError, match="needs two encoders or more, got 1"):
        build_vision_encoder({"family": "fused", "encoders": [{"family": "siglip", "config": SIGLIP}]})
    fused = load_vision_encoder("fused", f"dinov2={paths[0]},siglip={paths[1]}")
    with pytest.raises(ShapeError, match=r"shape \(B, 6, 28, 28\) but got \(1, 3, 28, 28\)"):
        fused(torch.randn(1, 3, 28, 28))
