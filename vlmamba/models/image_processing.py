"""Pictures to normalised pixel values, with PIL and numpy alone.

Saved and loaded as JSON like any transformers image processor.

Shapes: n images, C = 3 * number of normalisations, S side of the square output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from vlmamba.common.images import open_image
from vlmamba.errors import ConfigError
from vlmamba.registry import close_matches

MODES = ("pad", "resize", "crop")
RESAMPLES = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
MAX_CANVAS = 1 << 26
"""Pixels of the largest intermediate image; beyond it (slivers of extreme shape) the image is resized before
it is padded, or cropped before it is resized, so that memory stays bounded."""
_FROM_TRANSFORMERS = (
    "image_processor_type",
    "processor_class",
    "feature_extractor_type",
    "auto_map",
    "_processor_class",
)


class VLMambaImageProcessor(BaseImageProcessor):
    """Square, normalised pixel values for one encoder or several fused ones.

    Args:
        size: Side S of the output in pixels (or ``{"height": S, "width": S}``).
        mode: "pad" pads to a square with the mean colour, centred, then resizes (LLaVA-1.5's
            ``image_aspect_ratio pad``); "resize" resizes to S x S whatever the aspect; "crop" resizes the
            short side to S and cuts out the centre.
        mean: Mean per channel of pixel values in [0, 1]; 3 numbers, or 3 * n for n fused encoders, each of
            which gets its own normalisation (and its own padding colour) of the same picture.
        std: Standard deviation per channel, as many as `mean`.
        resample: "bicubic", "bilinear", "lanczos", "nearest", "box" or "hamming".
        exif_transpose: Turn pictures as their EXIF orientation says. Off by default, as in LLaVA.

    Raises:
        ConfigError: A setting is wrong.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - transformers declares it a list

    def __init__(
        self,
        size: int | dict[str, int] = 384,
        mode: str = "resize",
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        resample: str = "bicubic",
        exif_transpose: bool = False,
        **kwargs: Any,
    ) -> None:
        known = ["size", "mode", "mean", "std", "resample", "exif_transpose"]
        for key in kwargs:
            if key not in _FROM_TRANSFORMERS:
                raise ConfigError(
                    f"image processor: unknown setting {key!r}.{close_matches(key, known)} Known: "
                    f"{', '.join(known)}."
                )
        super().__init__()
        self.size = _side(size)
        self.mode = _choice(mode, MODES, "mode")
        self.resample = _choice(resample, tuple(RESAMPLES), "resample")
        self.mean = [float(x) for x in mean]
        self.std = [float(x) for x in std]
        self.exif_transpose = bool(exif_transpose)
        if not self.mean or len(self.mean) % 3 or len(self.mean) != len(self.std):
            raise ConfigError(
                f"image processor: mean and std need 3 numbers each (3 * n for n fused encoders), got "
                f"{len(self.mean)} and {len(self.std)}."
            )
        if min(self.std) <= 0:
            raise ConfigError(f"image processor: std must be positive, got {self.std}.")

    @property
    def num_channels(self) -> int:
        """Channels C of the output."""
        return len(self.mean)

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """(C, S, S) of what becomes of an image."""
        return self.num_channels, self.size, self.size

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-able values."""
        return {
            "image_processor_type": type(self).__name__,
            "size": self.size,
            "mode": self.mode,
            "mean": self.mean,
            "std": self.std,
            "resample": self.resample,
            "exif_transpose": self.exif_transpose,
        }

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """See `preprocess`."""
        return self.preprocess(images, *args, **kwargs)

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Prepare images.

        Args:
            images: One image or a (nested) list of images, of any kind that `vlmamba.common.images.open_image` takes.
            return_tensors: "pt" for a torch tensor, "np" for a numpy array.
            **kwargs: Nothing else is known; keys set to None are ignored.

        Returns:
            ``{"pixel_values": (n, C, S, S) float32}``.

        Raises:
            ImageError: An image cannot be read.
            ConfigError: An unknown argument.
        """
        unknown = [key for key, value in kwargs.items() if value is not None]
        if unknown:
            raise ConfigError(
                f"image processor: unknown argument {unknown[0]!r}. Settings such as size and mode are "
                f"given when the "
                f"processor is made (or saved with the checkpoint), not per call."
            )
        flat = list(_flatten(images))
        stacked = np.empty((len(flat), *self.output_shape), dtype=np.float32)
        for image, out in zip(flat, stacked, strict=True):
            self.process_one(image, out)
        return BatchFeature(data={"pixel_values": stacked}, tensor_type=return_tensors)

    def open(self, image: Any, events: list[str] | None = None) -> Image.Image:
        """The picture that `process_one` prepares: `vlmamba.common.images.open_image` with this model's setting."""
        return open_image(image, exif_transpose=self.exif_transpose, events=events)

    def process_one(self, image: Any, out: np.ndarray | None = None) -> np.ndarray:
        """One image (any kind that `preprocess` takes) to a (C, S, S) float32 array, or into `out`."""
        picture = self.open(image)
        squares: dict[tuple[int, ...], list[np.ndarray]] = {}
        result = np.empty(self.output_shape, dtype=np.float32) if out is None else out
        for start in range(0, self.num_channels, 3):
            mean, std = self.mean[start : start + 3], self.std[start : start + 3]
            fill = tuple(int(x * 255) for x in mean) if self.mode == "pad" else ()
            if fill not in squares:
                squares[fill] = [np.asarray(band) for band in self._square(picture, fill).split()]
            for channel, (pixels, m, s) in enumerate(zip(squares[fill], mean, std, strict=True), start=start):
                plane = result[channel]
                plane[...] = pixels
                plane *= np.float32(1 / (255 * s))
                plane -= np.float32(m / s)
        return result

    def _square(self, picture: Image.Image, fill: tuple[int, ...]) -> Image.Image:
        """An S x S RGB image."""
        filter_, side = RESAMPLES[self.resample], self.size
        if self.mode == "resize":
            return picture.resize((side, side), resample=filter_)
        if self.mode == "pad":
            return _pad_to_square(picture, side, filter_, fill)
        return _crop_centre(picture, side, filter_)


def _pad_to_square(
    picture: Image.Image, side: int, filter_: Image.Resampling, fill: tuple[int, ...]
) -> Image.Image:
    """Centre the picture on a square of one colour, then resize.

    The geometry (floor division of the difference) is that of ``expand2square`` in LLaVA's
    ``llava/mm_utils.py``.
    """
    longest = max(picture.size)
    if longest * longest > MAX_CANVAS:
        scale = side / longest
        width, height = (max(1, round(x * scale)) for x in picture.size)
        picture, longest = picture.resize((width, height), resample=filter_), side
    width, height = picture.size
    if width == height:
        canvas = picture
    else:
        canvas = Image.new("RGB", (longest, longest), fill)
        canvas.paste(picture, ((longest - width) // 2, (longest - height) // 2))
    return canvas.resize((side, side), resample=filter_)


def _crop_centre(picture: Image.Image, side: int, filter_: Image.Resampling) -> Image.Image:
    """Resize the short side, then cut out the centre; rounding as in transformers' CLIP image processor."""
    width, height = picture.size
    short, long = min(width, height), max(width, height)
    new_long = int(side * long / short)
    if side * new_long > MAX_CANVAS:
        left, top = (width - short) / 2, (height - short) / 2
        return picture.resize((side, side), resample=filter_, box=(left, top, left + short, top + short))
    new_width, new_height = (side, new_long) if width <= height else (new_long, side)
    resized = picture.resize((new_width, new_height), resample=filter_)
    left, top = (new_width - side) // 2, (new_height - side) // 2
    return resized.crop((left, top, left + side, top + side))


def _flatten(images: Any) -> Iterator[Any]:
    """Images of a nested list, or a single image; a 4-D array counts as a list."""
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from _flatten(image)
    elif getattr(images, "ndim", 0) == 4:
        yield from images
    else:
        yield images


def _side(size: Any) -> int:
    """The side of a square size."""
    if isinstance(size, dict):
        values = set(size.values())
        if len(values) != 1 or not set(size) <= {"height", "width", "shortest_edge"}:
            raise ConfigError(f"image processor: size {size} is not square. Give one number of pixels.")
        size = values.pop()
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ConfigError(f"image processor: size must be a positive number of pixels, got {size!r}.")
    return size


def _choice(value: Any, known: tuple[str, ...], name: str) -> str:
    """A known word."""
    if value not in known:
        raise ConfigError(
            f"image processor: unknown {name} {value!r}.{close_matches(str(value), list(known))} Known: "
            f"{', '.join(known)}."
        )
    return str(value)
