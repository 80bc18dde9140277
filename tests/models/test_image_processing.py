"""The image processor: parity with transformers and LLaVA, batches, saving, errors (pictures: tests/common)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlmamba.errors import ConfigError
from vlmamba.models.image_processing import MAX_CANVAS, VLMambaImageProcessor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def picture(width: int = 50, height: int = 31, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def values(processor: VLMambaImageProcessor, image: Any) -> np.ndarray:
    return processor(image, return_tensors="np")["pixel_values"][0]


# ---- parity ----
@pytest.mark.parametrize("shape", [(50, 31), (31, 50), (24, 24), (7, 90)])
def test_resize_equals_transformers_siglip(shape: tuple[int, int]) -> None:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    theirs = SiglipImageProcessorPil(size={"height": 24, "width": 24})
    expected = theirs(picture(*shape), return_tensors="np")["pixel_values"][0]
    ours = values(VLMambaImageProcessor(24, "resize"), picture(*shape))
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(50, 31), (31, 50), (24, 24), (33, 97), (200, 25)])
def test_crop_equals_transformers_clip(shape: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    theirs = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    expected = theirs(picture(*shape), return_tensors="np")["pixel_values"][0]
    ours = values(VLMambaImageProcessor(24, "crop", CLIP_MEAN, CLIP_STD), picture(*shape))
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("resample", ["bilinear", "lanczos", "nearest"])
def test_resample_filters_are_pillows(resample: str) -> None:
    ours = values(VLMambaImageProcessor(16, "resize", resample=resample), picture())
    filter_ = getattr(Image.Resampling, resample.upper())
    expected = np.asarray(picture().resize((16, 16), filter_), dtype=np.float32) / 127.5 - 1
    np.testing.assert_allclose(ours, expected.transpose(2, 0, 1), atol=1e-5)


@pytest.mark.parametrize(("width", "height"), [(50, 31), (31, 50), (30, 30), (2, 40), (40, 3)])
def test_pad_is_a_centred_square_of_the_mean_colour(width: int, height: int) -> None:
    """The definition of LLaVA's expand2square, written out pixel by pixel, with background int(x * 255)."""
    image = picture(width, height)
    side = max(width, height)
    canvas = np.empty((side, side, 3), dtype=np.uint8)
    canvas[:] = [int(x * 255) for x in CLIP_MEAN]
    left, top = (side - width) // 2, (side - height) // 2
    canvas[top : top + height, left : left + width] = np.asarray(image)
    expected = values(VLMambaImageProcessor(24, "resize", CLIP_MEAN, CLIP_STD), Image.fromarray(canvas))
    ours = values(VLMambaImageProcessor(24, "pad", CLIP_MEAN, CLIP_STD), image)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_fused_normalisations_share_the_geometry_and_pad_with_their_own_mean() -> None:
    means, stds = (*CLIP_MEAN, 0.5, 0.5, 0.5), (*CLIP_STD, 0.5, 0.5, 0.5)
    for mode in ("pad", "resize", "crop"):
        both = values(VLMambaImageProcessor(24, mode, means, stds), picture())
        assert both.shape == (6, 24, 24) and both.dtype == np.float32
        assert np.array_equal(
            both[:3], values(VLMambaImageProcessor(24, mode, CLIP_MEAN, CLIP_STD), picture())
        )
        assert np.array_equal(both[3:], values(VLMambaImageProcessor(24, mode), picture()))
    corner = values(VLMambaImageProcessor(24, "pad", means, stds), picture())[:, 0, 0]
    assert np.abs(corner).max() < 0.02  # the mean colour is about zero for each


# ---- batches ----
def test_files_bytes_lists_and_batches(tmp_path: Path) -> None:
    processor = VLMambaImageProcessor(12)
    path = tmp_path / "a.png"
    picture().save(path)
    batch = processor([picture(), [str(path), path], path.read_bytes()])["pixel_values"]
    assert isinstance(batch, torch.Tensor) and batch.dtype == torch.float32 and batch.shape == (4, 3, 12, 12)
    assert all(torch.equal(image, batch[0]) for image in batch)
    assert processor(picture())["pixel_values"].shape == (1, 3, 12, 12)
    assert processor([])["pixel_values"].shape == (0, 3, 12, 12)
    frames = np.stack([np.asarray(picture(seed=i)) for i in range(2)])
    assert processor(frames)["pixel_values"].shape == (2, 3, 12, 12)


@pytest.mark.parametrize("mode", ["pad", "resize", "crop"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (1, 16000), (16000, 1)])
def test_slivers_of_any_shape_work_in_little_memory(mode: str, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (10, 20, 30))
    result = values(VLMambaImageProcessor(24, mode), image)
    assert result.shape == (3, 24, 24) and np.isfinite(result).all()
    if mode != "pad":
        np.testing.assert_allclose(result[:, 5, 5], np.array([10, 20, 30]) / 127.5 - 1, atol=1e-6)
    assert max(size) < 16000 or max(size) ** 2 > MAX_CANVAS


# ---- saving ----
def test_settings_survive_saving(tmp_path: Path) -> None:
    means, stds = [*CLIP_MEAN, 0.5, 0.5, 0.5], [*CLIP_STD, 0.5, 0.5, 0.5]
    processor = VLMambaImageProcessor(28, "pad", means, stds, resample="bilinear", exif_transpose=True)
    processor.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert content == {
        "image_processor_type": "VLMambaImageProcessor",
        "size": 28,
        "mode": "pad",
        "mean": means,
        "std": stds,
        "resample": "bilinear",
        "exif_transpose": True,
    }
    again = VLMambaImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict()
    assert np.array_equal(values(again, picture()), values(processor, picture()))


def test_auto_image_processor_finds_it(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, PretrainedConfig

    class SomeConfig(PretrainedConfig):
        model_type = "image-processing-test"

    AutoImageProcessor.register(SomeConfig, image_processor_classes={"pil": VLMambaImageProcessor})
    VLMambaImageProcessor(20, "crop").save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(again) is VLMambaImageProcessor and (again.size, again.mode) == (20, "crop")


# ---- errors ----
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "padd"}, "unknown mode 'padd'. Did you mean 'pad'? Known: pad, resize, crop."),
        ({"resample": "cubic"}, "unknown resample 'cubic'. Did you mean 'bicubic'"),
        ({"mean": (0.5,)}, "mean and std need 3 numbers each (3 * n for n fused encoders), got 1 and 3."),
        ({"mean": (0.5,) * 6}, "got 6 and 3."),
        ({"std": (0.5, 0.0, 0.5)}, "std must be positive, got [0.5, 0.0, 0.5]."),
        ({"size": 0}, "size must be a positive number of pixels, got 0."),
        ({"size": {"height": 3, "width": 4}}, "size {'height': 3, 'width': 4} is not square."),
        ({"sise": 3}, "unknown setting 'sise'. Did you mean 'size'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        VLMambaImageProcessor(**settings)
    assert message in str(caught.value)


def test_wrong_arguments_of_a_call() -> None:
    processor = VLMambaImageProcessor(8)
    with pytest.raises(ConfigError, match="unknown argument 'do_resize'"):
        processor(picture(), do_resize=False)
    assert processor(picture(), do_resize=None)["pixel_values"].shape == (1, 3, 8, 8)
