"""open_clip towers: its own ViT, timm ViTs, feature maps; against open_clip's own outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmamba.errors import CheckpointError, ConfigError, MissingFileError
from vlmamba.models.vision import build_vision_encoder, load_vision_encoder

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")

TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 28, "patch_size": 7, "width": 32, "head_width": 16, "layers": 3, "mlp_ratio": 2.0}
NATIVE = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": True}
# timm's miniature ViTs: test_vit has a class token (64 wide, 6 blocks), test_vit2 has none
CLS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token"},
    "text_cfg": TEXT,
}
NO_CLS = {
    "embed_dim": 0,
    "vision_cfg": {
        "image_size": 160,
        "timm_model_name": "test_vit2",
        "timm_pool": "avg",
        "timm_proj": "none",
    },
    "text_cfg": TEXT,
    "custom_text": True,
}
RESNET = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    "text_cfg": TEXT,
}
CONVNEXT = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 64,
        "timm_model_name": "test_convnext",
        "timm_pool": "",
        "timm_proj": "linear",
    },
    "text_cfg": TEXT,
}


def whole(config: dict[str, Any]) -> Any:
    """open_clip's full model with random parameters."""
    torch.manual_seed(0)
    settings = {key: value for key, value in config.items() if key != "custom_text"}
    if config["embed_dim"] == 0:
        settings["embed_dim"] = 16
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    model = kind(**settings).eval()
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.normal_(std=0.1)
    return model


def saved(config: dict[str, Any], path: Path, name: str = "open_clip_model.safetensors") -> Any:
    from safetensors.torch import save_model

    model = whole(config)
    path.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"}
    content = {"model_cfg": config, "preprocess_cfg": {**preprocess, "interpolation": "bicubic"}}
    (path / "open_clip_config.json").write_text(json.dumps(content))
    if name.endswith(".safetensors"):
        save_model(model, str(path / name))
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path / name)
    return model


@pytest.mark.parametrize("layer", [-2, -1, 1])
def test_native_vit_equals_open_clips_intermediates(layer: int, tmp_path: Path) -> None:
    model = saved(NATIVE, tmp_path)
    encoder = load_vision_encoder("open_clip", str(tmp_path), feature_layer=layer)
    assert encoder.grid == (4, 4) and encoder.hidden_size == 32
    x = torch.randn(2, 3, 28, 28)
    block = layer - 1 if layer > 0 else 3 + layer
    expected = model.visual.forward_intermediates(x, [block], intermediates_only=True, output_fmt="NLC")
    torch.testing.assert_close(encoder(x), expected["image_intermediates"][0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("config", "blocks"), [(CLS, 6), (NO_CLS, 8)])
def test_timm_vit_equals_open_clips_intermediates(
    config: dict[str, Any], blocks: int, tmp_path: Path
) -> None:
    model = saved(config, tmp_path)
    encoder = load_vision_encoder("open_clip", str(tmp_path))
    assert encoder.grid == (10, 10) and encoder.hidden_size == 64
    x = torch.randn(1, 3, 160, 160)
    output = model.visual.forward_intermediates(
        x, [blocks - 2], intermediates_only=True, output_fmt="NLC", output_extra_tokens=config is CLS
    )
    torch.testing.assert_close(encoder(x), output["image_intermediates"][0], atol=1e-5, rtol=1e-5)
    assert ("image_intermediates_prefix" in output) == (config is CLS)


@pytest.mark.parametrize("config", [NATIVE, CLS, NO_CLS])
def test_final_norm(config: dict[str, Any], tmp_path: Path) -> None:
    model = saved(config, tmp_path)
    encoder = load_vision_encoder("open_clip", str(tmp_path), feature_layer=-1, final_norm=True)
    x = torch.randn(1, 3, encoder.image_size, encoder.image_size)
    output = model.visual.forward_intermediates(
        x, 1, intermediates_only=True, output_fmt="NLC", normalize_intermediates=True
    )
    torch.testing.assert_close(encoder(x), output["image_intermediates"][0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("config", "stages"), [(RESNET, 5), (CONVNEXT, 4)])
def test_feature_maps_are_read_in_raster_order(config: dict[str, Any], stages: int) -> None:
    tower = {"family": "open_clip", "config": config, "feature_layer": -2}
    encoder: Any = build_vision_encoder(tower).eval()
    x = torch.randn(2, 3, 64, 64)
    features = encoder(x)
    assert features.shape == (2, encoder.num_tokens, encoder.hidden_size)
    output = encoder.visual.forward_intermediates(
        x, [stages - 2], intermediates_only=True, output_fmt="NCHW", stop_early=True
    )["image_intermediates"][0]
    height, width = encoder.grid
    assert output.shape == (2, encoder.hidden_size, height, width)
    torch.testing.assert_close(features[:, 1], output[:, :, 0, 1])
    torch.testing.assert_close(features[:, width], output[:, :, 1, 0])
    with pytest.raises(ConfigError, match=rf"this tower of {stages} stages has none: choose -{stages} to -1"):
        build_vision_encoder({**tower, "feature_layer": 0})
    with pytest.raises(ConfigError, match="final_norm fits only the last"):
        build_vision_encoder({**tower, "final_norm": True})


@pytest.mark.parametrize("config", [NATIVE, CLS, NO_CLS, RESNET, CONVNEXT])
def test_config_dict_rebuilds_the_same_modules(config: dict[str, Any]) -> None:
    for extra in ({}, {"feature_layer": -1}, {"image_size": 96 if config is not NATIVE else 42}):
        encoder = build_vision_encoder({"family": "open_clip", "config": config, **extra}).eval()
        again = build_vision_encoder(json.loads(json.dumps(encoder.config_dict()))).eval()
        assert again.config_dict() == encoder.config_dict()
        shapes = {key: value.shape for key, value in encoder.state_dict().items()}
        assert {key: value.shape for key, value in again.state_dict().items()} == shapes
        again.load_state_dict(encoder.state_dict())
        x = torch.randn(1, 3, encoder.image_size, encoder.image_size)
        assert torch.equal(again(x), encoder(x))


@pytest.mark.parametrize("config", [NATIVE, NO_CLS])
def test_positions_are_interpolated_as_open_clip_does(config: dict[str, Any], tmp_path: Path) -> None:
    model = saved(config, tmp_path)
    encoder: Any = load_vision_encoder("open_clip", str(tmp_path), image_size=42 if config is NATIVE else 192)
    table = encoder.state_dict()[
        "visual.positional_embedding" if config is NATIVE else "visual.trunk.pos_embed"
    ]
    if config is NATIVE:
        from open_clip.model import resize_pos_embed

        state = {key: value.clone() for key, value in model.state_dict().items()}
        bigger = whole({**NATIVE, "vision_cfg": {**VIT, "image_size": 42}})
        resize_pos_embed(state, bigger)
        expected = state["visual.positional_embedding"]
    else:
        model.visual.set_input_size(192)
        expected = model.visual.trunk.pos_embed
    torch.testing.assert_close(table, expected, atol=1e-5, rtol=1e-5)
    assert encoder.num_tokens == (36 if config is NATIVE else 144)
    assert encoder(torch.randn(1, 3, encoder.image_size, encoder.image_size)).isfinite().all()


def test_only_what_is_needed_is_kept_and_trained(tmp_path: Path) -> None:
    saved(CLS, tmp_path)
    for path, side in ((tmp_path, 160), (tmp_path / "native", 28)):
        if side == 28:
            saved(NATIVE, path)
        encoder = load_vision_encoder("open_clip", str(path)).train()
        encoder(torch.randn(1, 3, side, side)).sum().backward()
        assert [key for key, p in encoder.named_parameters() if p.grad is None] == []
        encoder.set_gradient_checkpointing(True)
        encoder(torch.randn(1, 3, side, side)).sum().backward()
        encoder.requires_grad_(False).to(torch.bfloat16)
        features = encoder(torch.randn(1, 3, side, side))
        assert not features.requires_grad and features.dtype == torch.bfloat16
        assert not any(module.training for module in encoder.modules())


def test_patch_dropout_never_breaks_the_grid() -> None:
    config = {**NATIVE, "vision_cfg": {**VIT, "patch_dropout": 0.5}}
    encoder = build_vision_encoder({"family": "open_clip", "config": config}).train()
    assert encoder(torch.randn(1, 3, 28, 28)).shape == (1, 16, 32)


def test_a_checkpoint_file_with_its_config_beside_it(tmp_path: Path) -> None:
    model = saved(NATIVE, tmp_path, "epoch_5.pt")
    x = torch.randn(1, 3, 28, 28)
    expected = model.visual.forward_intermediates(x, [1], intermediates_only=True, output_fmt="NLC")
    for path in (tmp_path / "epoch_5.pt", tmp_path):
        encoder = load_vision_encoder("open_clip", str(path))
        torch.testing.assert_close(encoder(x), expected["image_intermediates"][0], atol=1e-5, rtol=1e-5)
    assert encoder.image_defaults() == {
        "size": 28,
        "mode": "resize",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "resample": "bicubic",
    }


def test_siglips_full_size_tower_on_the_meta_device() -> None:
    config = open_clip.get_model_config("ViT-SO400M-14-SigLIP-384")
    with torch.device("meta"):
        encoder = build_vision_encoder({"family": "open_clip", "config": config})
    assert encoder.grid == (27, 27) and encoder.hidden_size == 1152
    assert all(p.is_meta for p in encoder.parameters())
    assert encoder(torch.empty(1, 3, 384, 384, device="meta")).shape == (1, 729, 1152)


def test_errors_name_the_thing(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"hf download timm/ViT-SO400M-14-SigLIP-384 --local-dir"):
        load_vision_encoder("open_clip", str(tmp_path / "nowhere"))
    with pytest.raises(
        ConfigError, match=r"open_clip has no model 'ViT-L-14-33'. Did you mean 'ViT-L-14-336'"
    ):
        load_vision_encoder("open_clip", "ViT-L-14-33:openai")
    with pytest.raises(ConfigError, match=r"ViT-L-14-336 has no weights 'opnai'. Known: .*openai"):
        load_vision_encoder("open_clip", "ViT-L-14-336:opnai")
    with pytest.raises(ConfigError, match="needs 'embed_dim' and 'vision_cfg'"):
        build_vision_encoder({"family": "open_clip", "config": {"embed_dim": 8}})
    with pytest.raises(ConfigError, match=r"vision_cfg: unknown key 'widht'. Did you mean 'width'"):
        build_vision_encoder({"family": "open_clip", "config": {"embed_dim": 8, "vision_cfg": {"widht": 8}}})
    with pytest.raises(ConfigError, match="the tower has 3 blocks, so it may be -4 to 3"):
        build_vision_encoder({"family": "open_clip", "config": NATIVE, "feature_layer": -9})


def test_broken_checkpoints(tmp_path: Path) -> None:
    model = saved(NATIVE, tmp_path, "weights.pt")
    file = tmp_path / "weights.pt"
    state = model.state_dict()
    torch.save({key: value for key, value in state.items() if "resblocks.1." not in key}, file)
    with pytest.raises(CheckpointError, match="is not complete: 12 tensors of the vision tower are missing"):
        load_vision_encoder("open_clip", str(file))
    torch.save({"text.weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"none of its 1 tensors is called 'visual\.\*'"):
        load_vision_encoder("open_clip", str(file))
    torch.save({"visual.conv1.weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="does not fit its config"):
        load_vision_encoder("open_clip", str(file))
    file.write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="not a readable, weights-only checkpoint"):
        load_vision_encoder("open_clip", str(file))
    torch.save({"visual": Path("/")}, file)  # a pickled object that is no tensor
    with pytest.raises(CheckpointError, match="not a readable, weights-only checkpoint"):
        load_vision_encoder("open_clip", str(file))
