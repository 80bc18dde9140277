"""Overlays: patches lie where the image processor took them from."""

import numpy as np
import pytest
from PIL import Image

from vlmamba.interpret.overlay import COLOURS, colours, overlay, patch_grid
from vlmamba.models import VLMambaImageProcessor


@pytest.mark.parametrize("mode", ["pad", "resize", "crop"])
@pytest.mark.parametrize("size", [(64, 32), (32, 64), (48, 48), (33, 50)])
def test_a_patch_lies_where_its_pixels_came_from(mode, size):
    """One patch's box painted white is the one white patch of what the model sees."""
    processor = VLMambaImageProcessor(size=16, mode=mode, mean=[0.0] * 3, std=[1.0] * 3, resample="box")
    places = patch_grid(processor, size, (4, 4))
    row, column = 2, 1
    left, top, right, bottom = places.box(row, column, size)
    assert right > left
    assert bottom > top
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[top:bottom, left:right] = 255
    seen = processor.process_one(Image.fromarray(pixels)).mean(0).reshape(4, 4, 4, 4).mean((1, 3))
    assert np.unravel_index(seen.argmax(), seen.shape) == (row, column)
    assert seen[row, column] > 0.6 * seen.sum()


def test_pixels_beyond_the_last_whole_patch_belong_to_none():
    places = patch_grid(VLMambaImageProcessor(size=384, mode="resize"), (384, 384), (27, 27))
    assert (places.width, places.box(26, 26, (384, 384))) == (14, (364, 364, 378, 378))


def test_the_bright_patch_is_the_hot_one():
    processor = VLMambaImageProcessor(size=16, mode="pad", mean=[0.5] * 3, std=[0.5] * 3)
    heat = np.full((4, 4), -1.0)
    heat[1, 3] = 2.0
    shown = overlay(Image.new("RGB", (16, 8), (90, 90, 90)), heat, processor)
    assert shown.size == (384, 192)
    light = np.asarray(shown).astype(float).sum(-1)
    row, column = np.unravel_index(light.argmax(), light.shape)
    # Padding of 4 pixels above: patch row 1 is the picture's first 4 pixels, column 3 its last 4.
    assert row < 96
    assert column >= 288


def test_more_is_lighter():
    luminance = colours(np.linspace(0, 1, 50)) @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luminance) > 0).all()
    assert colours(np.array([0.0, 1.0])).tolist() == COLOURS[[0, -1]].tolist()
