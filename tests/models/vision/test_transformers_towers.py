"""Towers of transformers: parity, class tokens, feature layers, frozen behaviour, rebuilding, loading."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from vlmamba.errors import CheckpointError, ConfigError, MissingFileError, ShapeError
from vlmamba.models.vision import VisionEncoder, build_vision_encoder, load_vision_encoder
from vlmamba.models.vision.sources import looks_like_hub_id

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 30,  # 4 whole patches of 7 and a rest of 2 pixels
    "patch_size": 7,
}
DINO = {key: value for key, value in TINY.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
NAFLEX = {key: value for key, value in TINY.items() if key != "image_size"} | {"num_patches": 16}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}

CASES: dict[str, tuple[str, dict[str, Any], str, str, int]] = {
    # name: (family, config, config class, model class, prefix tokens of transformers' output)
    "siglip": ("siglip", TINY, "SiglipVisionConfig", "SiglipVisionModel", 0),
    "siglip2": ("siglip2", TINY, "SiglipVisionConfig", "SiglipVisionModel", 0),
    "naflex": (
        "siglip2",
        {**NAFLEX, "model_type": "siglip2_vision_model"},
        "Siglip2VisionConfig",
        "Siglip2VisionModel",
        0,
    ),
    "clip": ("clip", TINY, "CLIPVisionConfig", "CLIPVisionModel", 1),
    "dinov2": ("dinov2", DINO, "Dinov2Config", "Dinov2Model", 1),
    "registers": (
        "dinov2",
        {**DINO, "num_register_tokens": 3, "model_type": "dinov2_with_registers"},
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersModel",
        4,
    ),
}


def reference(name: str) -> Any:
    """transformers' own model, all parameters random (many are zeros or ones as initialised)."""
    _, config, config_class, model_class, _ = CASES[name]
    torch.manual_seed(0)
    settings = {key: value for key, value in config.items() if key != "model_type"}
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def saved(name: str, path: Path) -> Any:
    model = reference(name)
    model.save_pretrained(path)
    return model


def hidden_states(name: str, model: Any, pixels: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """transformers' (hidden_states, last_hidden_state)."""
    if name != "naflex":
        output = model(pixels, output_hidden_states=True)
        return output.hidden_states, output.last_hidden_state
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

    patches = torch.stack([torch.tensor(convert_image_to_patches(x[:, :28, :28].numpy(), 7)) for x in pixels])
    output = model(
        patches,
        pixel_attention_mask=torch.ones(len(pixels), 16, dtype=torch.int64),
        spatial_shapes=torch.tensor([[4, 4]] * len(pixels)),
        output_hidden_states=True,
    )
    return output.hidden_states, output.last_hidden_state


def pixels(side: int = 30, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def side_of(name: str) -> int:
    return 28 if name == "naflex" else 30


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layer", [-2, -1, 0, 3, -5])
def test_features_equal_transformers_hidden_states(name: str, layer: int, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    encoder = load_vision_encoder(CASES[name][0], str(tmp_path), feature_layer=layer)
    x = pixels(side_of(name))
    states, _ = hidden_states(name, model, x)
    expected = states[layer][:, CASES[name][4] :]
    assert encoder.grid == (4, 4) and encoder.num_tokens == 16 and encoder.hidden_size == 32
    assert encoder(x).shape == (2, 16, 32)
    torch.testing.assert_close(encoder(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_final_norm_is_applied_only_when_asked_for(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    x = pixels(side_of(name))
    states, last = hidden_states(name, model, x)
    prefix = CASES[name][4]
    with_norm = load_vision_encoder(CASES[name][0], str(tmp_path), feature_layer=-1, final_norm=True)
    expected = model.post_layernorm(states[-1]) if name == "clip" else last
    torch.testing.assert_close(with_norm(x), expected[:, prefix:], atol=1e-5, rtol=1e-5)
    without = load_vision_encoder(CASES[name][0], str(tmp_path), feature_layer=-1)
    assert (without(x) - with_norm(x)).abs().max() > 0.1


@pytest.mark.parametrize("name", ["siglip", "clip", "dinov2", "registers", "naflex"])
def test_no_patch_is_dropped_or_moved(name: str, tmp_path: Path) -> None:
    """Before any block, changing one patch of the image changes that token and no other."""
    saved(name, tmp_path)
    encoder = load_vision_encoder(CASES[name][0], str(tmp_path), feature_layer=0)
    x = pixels(side_of(name), batch=1)
    before = encoder(x)
    for row, column in ((0, 0), (0, 3), (2, 1), (3, 3)):
        changed = x.clone()
        changed[:, :, row * 7 : row * 7 + 7, column * 7 : column * 7 + 7] += 1.0
        moved = (encoder(changed) - before).abs().amax(dim=(0, 2)) > 1e-4
        assert moved.nonzero().flatten().tolist() == [row * 4 + column]


@pytest.mark.parametrize("name", CASES)
def test_only_needed_blocks_are_kept(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    layers = getattr(model.encoder, "layer", None) or model.encoder.layers
    encoder = load_vision_encoder(CASES[name][0], str(tmp_path), feature_layer=-3)
    dropped = 2 * count(layers[0]) + count(getattr(model, "layernorm", None) or model.post_layernorm)
    dropped += count(model.head) if hasattr(model, "head") else 0
    dropped += 32 if name in ("dinov2", "registers") else 0  # the mask token
    assert count(encoder) == count(model) - dropped


@pytest.mark.parametrize("name", CASES)
def test_config_dict_rebuilds_the_same_modules(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path)
    for settings in ({}, {"feature_layer": -1, "final_norm": True}, {"image_size": 42}):
        encoder = load_vision_encoder(CASES[name][0], str(tmp_path), **settings)
        described = json.loads(json.dumps(encoder.config_dict()))
        again = build_vision_encoder(described)
        assert again.config_dict() == encoder.config_dict()
        shapes = {key: value.shape for key, value in encoder.state_dict().items()}
        assert {key: value.shape for key, value in again.state_dict().items()} == shapes
        again.load_state_dict(encoder.state_dict())
        x = pixels(encoder.image_size)
        assert torch.equal(again.eval()(x), encoder.eval()(x))
        assert again.image_defaults() == encoder.image_defaults()


@pytest.mark.parametrize("name", CASES)
def test_positions_are_interpolated_as_in_transformers(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = saved(name, tmp_path)
    with caplog.at_level(logging.INFO, logger="vlmamba"):
        encoder = load_vision_encoder(CASES[name][0], str(tmp_path), image_size=44)
    assert encoder.grid == (6, 6) and encoder.num_tokens == 36
    assert "interpolated from a 4 x 4 to a 6 x 6 grid for 44 px images" in caplog.text
    if name == "naflex":
        return
    x = pixels(44)
    options = {} if CASES[name][0] == "dinov2" else {"interpolate_pos_encoding": True}
    states = model(x, output_hidden_states=True, **options).hidden_states
    torch.testing.assert_close(encoder(x), states[-2][:, CASES[name][4] :], atol=1e-5, rtol=1e-5)


def test_naflex_interpolation_is_transformers_own(tmp_path: Path) -> None:
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

    model = saved("naflex", tmp_path)
    encoder = load_vision_encoder("siglip2", str(tmp_path), image_size=42)
    x = pixels(42)
    patches = torch.stack([torch.tensor(convert_image_to_patches(image.numpy(), 7)) for image in x])
    output = model(
        patches, torch.ones(2, 36, dtype=torch.int64), torch.tensor([[6, 6]] * 2), output_hidden_states=True
    )
    torch.testing.assert_close(encoder(x), output.hidden_states[-2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_every_parameter_of_a_trainable_tower(name: str) -> None:
    encoder = build_vision_encoder({"family": CASES[name][0], "config": CASES[name][1]}).train()
    assert encoder.training
    x = pixels(encoder.image_size)
    encoder(x).square().sum().backward()
    assert [key for key, p in encoder.named_parameters() if p.grad is None] == []
    grads = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    encoder.zero_grad()
    encoder.set_gradient_checkpointing(True)
    encoder(x).square().sum().backward()
    for old, parameter in zip(grads, encoder.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, old)


@pytest.mark.parametrize("name", ["siglip", "clip", "dinov2", "naflex"])
def test_a_frozen_tower_stays_in_eval_mode_without_gradients(name: str) -> None:
    encoder = build_vision_encoder({"family": CASES[name][0], "config": CASES[name][1]}).train()
    parent = nn.ModuleDict({"tower": encoder, "other": nn.Linear(1, 1)})
    x = pixels(encoder.image_size).requires_grad_(True)
    encoder.requires_grad_(False)
    features = encoder(x)  # frozen after train(): the call itself puts it into eval mode
    assert not features.requires_grad and not any(m.training for m in encoder.modules())
    parent.train()
    assert parent["other"].training and not any(m.training for m in encoder.modules())
    next(encoder.parameters()).requires_grad_(True)
    parent.train()
    assert encoder.training and encoder(x).requires_grad


@pytest.mark.parametrize("name", CASES)
def test_features_come_in_the_dtype_of_the_parameters(name: str) -> None:
    encoder = build_vision_encoder({"family": CASES[name][0], "config": CASES[name][1]})
    encoder.requires_grad_(False).to(torch.bfloat16)
    features = encoder(pixels(encoder.image_size))
    assert features.dtype == torch.bfloat16 and torch.isfinite(features).all()


def test_attention_is_sdpa() -> None:
    encoder: Any = build_vision_encoder({"family": "siglip", "config": TINY})
    assert encoder.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["siglip", "clip", "siglip2"])
def test_two_tower_checkpoints_load_by_content(family: str, tmp_path: Path) -> None:
    prefix = {"siglip": "Siglip", "clip": "CLIP", "siglip2": "Siglip"}[family]
    config = getattr(transformers, f"{prefix}Config")(vision_config=TINY, text_config=TEXT)
    both = getattr(transformers, f"{prefix}Model")(config).eval()
    both.save_pretrained(tmp_path)
    encoder = load_vision_encoder(family, str(tmp_path))
    x = pixels()
    states = both.vision_model(x, output_hidden_states=True).hidden_states
    expected = states[-2][:, 1 if family == "clip" else 0 :]
    torch.testing.assert_close(encoder(x), expected, atol=1e-5, rtol=1e-5)


def test_naflex_two_tower_checkpoint(tmp_path: Path) -> None:
    config = transformers.Siglip2Config(vision_config=NAFLEX, text_config=TEXT)
    both = transformers.Siglip2Model(config)
    both.save_pretrained(tmp_path)
    encoder = load_vision_encoder("siglip2", str(tmp_path))
    assert encoder.image_size == 28 and encoder.num_tokens == 16
    position = both.vision_model.embeddings.position_embedding.weight
    assert torch.equal(encoder.state_dict()["model.embeddings.position_embedding.weight"], position)


def test_loading_is_silent_about_what_is_left_in_the_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    saved("siglip", tmp_path)
    capfd.readouterr()
    load_vision_encoder("siglip", str(tmp_path))
    assert "UNEXPECTED" not in "".join(capfd.readouterr())


def test_image_settings_come_from_the_checkpoint(tmp_path: Path) -> None:
    saved("siglip", tmp_path)
    assert load_vision_encoder("siglip", str(tmp_path)).image_defaults() == {
        "size": 30,
        "mode": "resize",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "resample": "bicubic",
    }
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5], "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    encoder = load_vision_encoder("siglip", str(tmp_path))
    assert encoder.image_defaults()["mean"] == [0.1, 0.2, 0.3]
    assert encoder.image_defaults()["resample"] == "bilinear"
    assert encoder.config_dict()["image"] == {"mean": [0.1, 0.2, 0.3], "resample": "bilinear"}


class Wrapper(transformers.PreTrainedModel):
    """A transformers model around an encoder, as the vision-language model is one."""

    config_class = transformers.PretrainedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vision_tower = build_vision_encoder(config.vision)
        self.post_init()


@pytest.mark.parametrize("name", CASES)
def test_an_encoder_survives_a_parents_save_and_load(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path / "source")
    encoder = load_vision_encoder(CASES[name][0], str(tmp_path / "source"), image_size=42)
    wrapper = Wrapper(transformers.PretrainedConfig(vision=encoder.config_dict()))
    wrapper.vision_tower.load_state_dict(encoder.state_dict())
    wrapper.save_pretrained(tmp_path / "saved")
    again = Wrapper.from_pretrained(tmp_path / "saved")
    x = pixels(42)
    assert torch.equal(again.vision_tower(x), encoder.eval()(x))


# ---- errors ----
def test_unknown_family_names_close_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown vision encoder 'siglp'. Did you mean 'siglip' or 'siglip2'"
    ):
        build_vision_encoder({"family": "siglp"})
    with pytest.raises(ConfigError, match="needs 'family', one of clip, dinov2, fused, open_clip, siglip"):
        build_vision_encoder({"feature_layer": -2})


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"siglip encoder: unknown key 'feature_layr'. Did you mean 'feature_layer'"
    ):
        build_vision_encoder({"family": "siglip", "feature_layr": -2})
    with pytest.raises(
        ConfigError, match=r"config of the clip encoder: unknown key 'hiden_size'. Did you mean 'hidden"
    ):
        build_vision_encoder({"family": "clip", "config": {"hiden_size": 32}})
    # settings of transformers that say nothing about the architecture are ignored
    encoder = build_vision_encoder({"family": "siglip", "config": {**TINY, "architectures": ["X"]}})
    assert "architectures" not in encoder.config_dict()["config"]


@pytest.mark.parametrize(
    "key", ["dtype", "torch_dtype", "_name_or_path", "quantization_config", "architectures"]
)
def test_keys_that_transformers_adds_change_nothing(key: str) -> None:
    config = {"family": "siglip", "config": TINY}
    plain = build_vision_encoder(config).config_dict()
    assert build_vision_encoder({**config, key: "float16"}).config_dict() == plain
    inner = {**config, "config": {**TINY, key: "float16"}}
    assert build_vision_encoder(inner).config_dict() == plain
    fused = {"family": "fused", "encoders": [config, config]}
    assert (
        build_vision_encoder({**fused, key: "x"}).config_dict() == build_vision_encoder(fused).config_dict()
    )


@pytest.mark.parametrize("layer", [5, -6, 100])
def test_feature_layer_out_of_range(layer: int) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"feature_layer {layer} is out of range: the tower has 4 blocks, so it may be -5 to 4",
    ):
        build_vision_encoder({"family": "siglip", "config": TINY, "feature_layer": layer})


def test_images_of_another_size_are_refused_with_both_sizes() -> None:
    encoder: VisionEncoder = build_vision_encoder({"family": "dinov2", "config": DINO})
    with pytest.raises(
        ShapeError, match=r"takes pixel_values of shape \(B, 3, 30, 30\) but got \(2, 3, 28, 28\)"
    ):
        encoder(pixels(28))
    with pytest.raises(ShapeError, match=r"got \(3, 30, 30\)"):
        encoder(pixels(30)[0])


def test_a_missing_directory_is_named_with_where_to_get_it(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "siglip-so400m-patch14-384"
    with pytest.raises(MissingFileError) as caught:
        load_vision_encoder("siglip", str(path))
    assert f"no siglip checkpoint at {path} (no such directory)" in str(caught.value)
    assert f"hf download google/siglip-so400m-patch14-384 --local-dir {path}" in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match=r"the directory has no config\.json"):
        load_vision_encoder("dinov2", str(tmp_path / "empty"))


def test_relative_paths_are_not_taken_for_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No download is tried for a path whose folder is only not there yet."""
    monkeypatch.chdir(tmp_path)
    for path in ("checkpoints/mine", "somewhere/dinov2-large", "a/b/c"):
        with pytest.raises(MissingFileError, match=rf"no dinov2 checkpoint at {path} \(no such directory\)"):
            load_vision_encoder("dinov2", path)
    assert looks_like_hub_id("facebook/dinov2-large") and looks_like_hub_id("someone/some-model")


def test_a_directory_without_weights_says_so(tmp_path: Path) -> None:
    transformers.SiglipVisionConfig(**TINY).save_pretrained(tmp_path)
    with pytest.raises(MissingFileError, match="hf download google/siglip-so400m-patch14-384 --local-dir"):
        load_vision_encoder("siglip", str(tmp_path))


def test_a_checkpoint_of_another_family_is_named(tmp_path: Path) -> None:
    saved("clip", tmp_path)
    with pytest.raises(
        CheckpointError, match=r"type 'clip_vision_model', which is not of the family 'siglip'.*'clip'"
    ):
        load_vision_encoder("siglip", str(tmp_path))


def test_incomplete_and_misfitting_checkpoints(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved("siglip", tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    kept = {key: value for key, value in state.items() if "layers.1.mlp" not in key}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"\(siglip\): the weights do not fit the model. 4 missing: "):
        load_vision_encoder("siglip", str(tmp_path))
    (table,) = [key for key in state if key.endswith("position_embedding.weight")]
    state[table] = torch.zeros(9, 32)
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"1 of another shape: .*position_embedding.*\(9, 32\).*\(16, 32\)"
    ):
        load_vision_encoder("siglip", str(tmp_path))
