"""The image processor: parity with transformers and LLaVA, every kind of picture, saving, errors."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlmamba.errors import ConfigError, ImageError
from vlmamba.models.image_processing import MAX_CANVAS, VLMambaImageProcessor, to_rgb

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


@pytest.mark.parametrize(("width", "height"), [(50, 31), (31, 50), (30, 30), (1, 40), (40, 3)])
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


# ---- kinds of images ----
def test_every_mode_becomes_rgb() -> None:
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    colour = picture(16, 16)
    expected: dict[str, tuple[Image.Image, np.ndarray]] = {
        "L": (grey, np.asarray(grey.convert("RGB"))),
        "LA": (grey.convert("LA"), np.asarray(grey.convert("RGB"))),
        "RGBA": (colour.convert("RGBA"), np.asarray(colour)),
        "CMYK": (colour.convert("CMYK"), np.asarray(colour.convert("CMYK").convert("RGB"))),
        "1": (grey.convert("1"), np.asarray(grey.convert("1").convert("RGB"))),
        "P": (colour.convert("P"), np.asarray(colour.convert("P").convert("RGB"))),
    }
    for mode, (image, array) in expected.items():
        assert image.mode == mode
        assert np.array_equal(np.asarray(to_rgb(image)), array), mode


def test_palette_with_transparency_keeps_its_colours(recwarn: pytest.WarningsRecorder) -> None:
    image = picture(8, 8).quantize(4)
    colours = np.asarray(image.convert("RGB"))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=bytes([0, 128, 255, 255]))
    assert np.array_equal(np.asarray(to_rgb(buffer.getvalue())), colours)
    assert len(recwarn) == 0


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bit_grey_is_scaled_not_clipped(mode: str) -> None:
    deep = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    image = Image.fromarray(deep) if mode == "I;16" else Image.fromarray(deep.astype(np.int32))
    assert image.mode == mode
    assert np.asarray(to_rgb(image))[0, :, 1].tolist() == [0, 0, 1, 128, 255]


def test_arrays_and_tensors_of_every_layout_are_the_same_picture() -> None:
    processor = VLMambaImageProcessor(12, "resize")
    array = np.asarray(picture(20, 15))
    expected = values(processor, picture(20, 15))
    for given in (
        array,
        array.transpose(2, 0, 1),
        torch.tensor(array),
        torch.tensor(array).permute(2, 0, 1),
        array.astype(np.float32) / 255,
        torch.tensor(array).permute(2, 0, 1).to(torch.float64) / 255,
        array.astype(np.uint16) * 257,
        array.astype(np.int64),
    ):
        assert np.array_equal(values(processor, given), expected)
    grey = array[:, :, 0]
    expected = values(processor, Image.fromarray(grey))
    for given in (grey, grey[:, :, None], grey[None]):
        assert np.array_equal(values(processor, given), expected)


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


def test_exif_orientation_is_applied_only_when_asked_for() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 270 degrees to show
    buffer = io.BytesIO()
    picture(20, 10).save(buffer, "PNG", exif=exif)
    assert to_rgb(buffer.getvalue()).size == (20, 10)
    assert to_rgb(buffer.getvalue(), exif_transpose=True).size == (10, 20)
    turned = values(VLMambaImageProcessor(8, exif_transpose=True), buffer.getvalue())
    assert not np.array_equal(turned, values(VLMambaImageProcessor(8), buffer.getvalue()))


@pytest.mark.parametrize("mode", ["pad", "resize", "crop"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (1, 60000), (60000, 1)])
def test_slivers_of_any_shape_work_in_little_memory(mode: str, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (10, 20, 30))
    result = values(VLMambaImageProcessor(24, mode), image)
    assert result.shape == (3, 24, 24) and np.isfinite(result).all()
    if mode != "pad":
        np.testing.assert_allclose(result[:, 5, 5], np.array([10, 20, 30]) / 127.5 - 1, atol=1e-6)
    assert max(size) < 60000 or max(size) ** 2 > MAX_CANVAS


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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "but got NoneType"),
        (np.zeros((2, 3, 4, 5, 6)), "an array of shape (2, 3, 4, 5, 6) is not an image"),
        (
            np.zeros((8, 9, 7), dtype=np.uint8),
            "an array of shape (8, 9, 7) is not an image: no axis of 1, 3 or 4",
        ),
        (np.zeros((0, 9, 3), dtype=np.uint8), "an array of shape (0, 9, 3) has no pixels"),
        (np.full((4, 4, 3), -0.3), "an array of float64 with values -0.3 to -0.3 is not an image"),
        (np.full((4, 4, 3), 300), "an array of int64 with values 300 to 300"),
        ("nowhere/a.png", "no image file at nowhere/a.png."),
        (b"not an image", "12 bytes is not an image of a known format"),
        (Image.new("F", (2, 2)), "mode 'F' (32-bit float) has no defined range"),
        (Image.new("RGB", (0, 4)), "an image of 0 x 4 pixels has nothing to show"),
    ],
)
def test_what_is_no_image_is_named(given: Any, message: str) -> None:
    with pytest.raises(ImageError) as caught:
        VLMambaImageProcessor(8)(given)
    assert message in str(caught.value)


def test_truncated_files_and_bombs(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    picture(64, 64).save(buffer, "PNG")
    cut = tmp_path / "cut.png"
    cut.write_bytes(buffer.getvalue()[:2000])
    with pytest.raises(ImageError, match=r"cannot read the image .*cut\.png"):
        VLMambaImageProcessor(8)(cut)
    lazy = Image.open(cut)
    with pytest.raises(ImageError, match="cannot decode an image of 64 x 64 pixels"):
        VLMambaImageProcessor(8)(lazy)
    data = bytearray(buffer.getvalue())
    data[16:24] = struct.pack(">II", 60000, 60000)  # the size in the header; its checksum comes after
    import zlib

    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    with pytest.raises(ImageError, match="cannot read the image"):
        VLMambaImageProcessor(8)(bytes(data))
