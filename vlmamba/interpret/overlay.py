"""Heat maps over the original picture: where each patch lies in it, colours, PNGs.

Shapes: H W patches, Y X pixels.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vlmamba.models.image_processing import VLMambaImageProcessor

SMALLEST, LARGEST = 384, 768
"""Sides in pixels: smaller pictures are enlarged by a whole factor, larger ones shrunk."""

COLOURS = np.array(
    [
        (0.267, 0.005, 0.329),
        (0.283, 0.141, 0.458),
        (0.254, 0.265, 0.530),
        (0.207, 0.372, 0.553),
        (0.164, 0.471, 0.558),
        (0.128, 0.567, 0.551),
        (0.135, 0.659, 0.518),
        (0.267, 0.749, 0.441),
        (0.478, 0.821, 0.318),
        (0.741, 0.873, 0.150),
        (0.993, 0.906, 0.144),
    ]
)
"""Eleven points of viridis (van der Walt and Smith 2015, dedicated to the public domain): lighter is always more."""


@dataclass(frozen=True)
class PatchGrid:
    """Where the model's patches lie in an original picture.

    Attributes:
        rows: H.
        columns: W.
        left: Left edge of the first column, in pixels of the picture; negative in padding.
        top: Top edge of the first row, likewise.
        width: Width of a patch, in pixels of the picture.
        height: Height of a patch.
    """

    rows: int
    columns: int
    left: float
    top: float
    width: float
    height: float

    def box(self, row: int, column: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of a patch, cut to a picture of `size` (width, height)."""
        x, y = self.left + column * self.width, self.top + row * self.height
        edges = (x, y, x + self.width, y + self.height)
        limits = (*size, *size)
        left, top, right, bottom = (
            min(max(round(edge), 0), limit) for edge, limit in zip(edges, limits, strict=True)
        )
        return left, top, right, bottom


def patch_grid(processor: VLMambaImageProcessor, size: tuple[int, int], grid: tuple[int, int]) -> PatchGrid:
    """Undo the image processor: from patches to pixels of the original picture.

    Args:
        processor: Its mode and size.
        size: Width and height of the picture.
        grid: Rows and columns of patches.
    """
    width, height = size
    side = processor.size
    left = top = 0.0
    if processor.mode == "pad":
        longest = max(size)
        left, top = -((longest - width) // 2), -((longest - height) // 2)
        scale_x = scale_y = longest / side
    elif processor.mode == "crop":
        scale_x = scale_y = min(size) / side
        left, top = (width - min(size)) / 2, (height - min(size)) / 2
    else:
        scale_x, scale_y = width / side, height / side
    rows, columns = grid
    # A tower sees whole patches alone: 27 x 14 of 384 pixels.
    return PatchGrid(rows, columns, left, top, scale_x * (side // columns), scale_y * (side // rows))


def overlay(picture: Any, heat: np.ndarray, processor: VLMambaImageProcessor) -> Image.Image:
    """A picture under its heat map; what no patch covers is dimmed.

    Args:
        picture: The original picture.
        heat: (H, W); 0 and below stays clear, the largest value is brightest.
        processor: The image processor of the model.
    """
    original = processor.open(picture)
    places = patch_grid(processor, original.size, (int(heat.shape[0]), int(heat.shape[1])))
    shown = _resized(original)
    pixels = np.asarray(shown, dtype=np.float64) / 255
    columns = _patch_of(shown.width, original.width, places.left, places.width)
    rows = _patch_of(shown.height, original.height, places.top, places.height)
    inside_y, inside_x = ((i >= 0) & (i < n) for i, n in ((rows, places.rows), (columns, places.columns)))
    strength = np.clip(heat, 0, None) / max(float(heat.max()), 1e-12)
    values = strength[rows.clip(0, places.rows - 1)][:, columns.clip(0, places.columns - 1)]
    values = np.where(inside_y[:, None] & inside_x, values, 0.0)[..., None]
    grey = pixels.mean(-1, keepdims=True) * 0.5 + pixels * 0.5
    weight = 0.35 + 0.4 * values
    mixed = grey * (1 - weight) + colours(values[..., 0]) * weight
    mixed = np.where((inside_y[:, None] & inside_x)[..., None], mixed, grey * 0.4)
    for index, inside, axis in ((rows, inside_y, 0), (columns, inside_x, 1)):
        lines = np.flatnonzero((np.diff(index) != 0) & (inside[1:] | inside[:-1])) + 1
        if len(lines) and len(index) / len(lines) >= 8:  # finer grids would hide the picture
            part = (lines, slice(None)) if axis == 0 else (slice(None), lines)
            mixed[part] = mixed[part] * 0.75 + 0.25
    return Image.fromarray((np.clip(mixed, 0, 1) * 255 + 0.5).astype(np.uint8))


def colours(values: np.ndarray) -> np.ndarray:
    """Colours (..., 3) of values in 0..1."""
    points = np.linspace(0, 1, len(COLOURS))
    return np.stack([np.interp(values, points, COLOURS[:, c]) for c in range(3)], axis=-1)


def png(picture: Image.Image) -> bytes:
    """The file's bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _patch_of(shown: int, original: int, start: float, step: float) -> np.ndarray:
    """Which patch (row or column) each shown pixel's centre lies in; outside 0..n-1 there is none."""
    centre = (np.arange(shown) + 0.5) * original / shown
    return np.floor((centre - start) / step).astype(np.int64)


def _resized(picture: Image.Image) -> Image.Image:
    width, height = picture.size
    factor = max(1, round(SMALLEST / max(picture.size)))
    if factor > 1:
        return picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)
    smaller = picture.copy()
    smaller.thumbnail((LARGEST, LARGEST))
    return smaller
