"""The one way to open a picture, for training, processor, pipeline, chat, server, evaluation and pages alike.

Sources are not trusted: sizes are checked in the header before anything is decoded, only raster formats that Pillow
decodes itself are tried (never EPS, which would start another program), nothing is fetched from an address, and
whatever a reader raises becomes an `ImageError`. No global state of Pillow is changed.

What comes out is RGB without metadata, so opening it again, with whichever settings, gives the same picture.
"""

from __future__ import annotations

import base64
import binascii
import functools
import io
import os
import stat
import threading
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmamba.common.vocabulary import StoredImage
from vlmamba.errors import ImageError

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".avif")
"""Of files that hold pictures; one may stand for another, see `find_image`."""
MAX_PIXELS = 89_478_485  # Pillow's own default limit: a quarter of a gigabyte as RGB
MAX_SIDE = 16_384  # padding to a square would make a thin strip a bomb
MAX_BYTES = 1 << 28
ONE_COLOUR = 16
"""A picture whose levels all lie within so many of 256 in every channel shows next to nothing: an event."""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(source: Any, *, exif_transpose: bool = False, events: list[str] | None = None) -> Image.Image:
    """Decode a picture completely and convert it to RGB.

    The first frame of an animation. 16 bits keep their upper eight; integers up to 255 and up to 65,535, and floats up
    to 1 and up to 255, are taken as such. Transparency is dropped, not blended, as LLaVA and the encoders' own
    pipelines do. A side of one pixel is doubled.

    Args:
        source: An `ImageRef`; a path, a data URL or base64 text as a string; or a numpy array or torch tensor, (H, W),
            (H, W, C) or (C, H, W).
        exif_transpose: Turn the picture as its EXIF orientation says. TIFF files are turned always: there the
            orientation is part of the format, and Pillow obeys it.
        events: Receives "image_suffix_replaced" when a file has another suffix than asked for, and
            "image_of_one_colour" when there is next to nothing to see (`ONE_COLOUR`).

    Returns:
        A picture of at least 2 x 2 pixels.

    Raises:
        ImageError: Missing, not a picture, damaged, too large, or an address.
    """
    what, image = _identified(source, events)
    try:
        with _quiet():
            image.load()
            turn = _TURNS.get(_orientation(image)) if exif_transpose else None
            picture = _to_rgb(image, what)
            picture = picture if turn is None else picture.transpose(turn)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"{what} is corrupt or cut off: {error}") from error
    if min(picture.size) < 2:
        picture = picture.resize(_at_least_two(picture.size), Image.Resampling.NEAREST)
    if picture.info or type(picture) is not Image.Image:
        picture = picture.copy() if picture is image else picture
        picture.info = {}
    if events is not None and _of_one_colour(picture):
        events.append("image_of_one_colour")
    return picture


def image_size(source: Any, *, exif_transpose: bool = False) -> tuple[int, int]:
    """Width and height that `open_image` would give, from the header.

    Raises:
        ImageError: As `open_image`, for what the header tells.
    """
    _, image = _identified(source, None)
    with _quiet():
        sideways = exif_transpose and image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)
    return _at_least_two(image.size[::-1] if sideways else image.size)


def find_image(path: Path) -> Path:
    """The path itself, or the file of that name with another suffix of pictures (OCR-VQA: listed .jpg, stored .gif).

    Raises:
        ImageError: There is no such file.
    """
    if os.path.exists(path):  # noqa: PTH110 (Path.exists raises for names that are too long)
        return path
    known = path.suffix.lower() in SUFFIXES
    for suffix in SUFFIXES if known else ():
        for spelled in (suffix, suffix.upper()):
            sibling = path.with_suffix(spelled)
            if os.path.exists(sibling):  # noqa: PTH110
                return sibling
    name = str(path) if len(str(path)) < 1000 else f"{str(path)[:200]}..."
    if not os.path.isdir(path.parent):  # noqa: PTH112
        raise ImageError(f"image {name} does not exist: there is no folder {str(path.parent)[:1000]}")
    others = f" (nor with another of {', '.join(SUFFIXES)})" if known else ""
    raise ImageError(f"image {name} does not exist{others}")


def from_base64(text: str, what: str = "a picture in base64") -> bytes:
    """The bytes of base64 text.

    Raises:
        ImageError: It is none, or has more than `MAX_BYTES`.
    """
    _check_bytes(len(text) * 3 // 4, what)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"{what} is not base64: {error}") from error


def _identified(source: Any, events: list[str] | None) -> tuple[str, Image.Image]:
    """What a picture is called in messages, and the picture, its size checked and nothing decoded."""
    if isinstance(source, Image.Image):
        what, image = "the given picture", source
        if source.format == "EPS":  # which another program would draw
            raise ImageError(f"{what} is PostScript, a program and not a picture")
    elif isinstance(source, np.ndarray) or (hasattr(source, "detach") and hasattr(source, "cpu")):
        what, image = "the given array", _from_array(source)
    else:
        what, data = _file_of(source, events)
        image = _header(what, data)
    width, height = image.size
    if not width or not height:
        raise ImageError(f"{what} has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ImageError(
            f"{what} is {width} x {height} = {width * height} pixels; the limits are {MAX_PIXELS} pixels and "
            f"{MAX_SIDE} a side. Shrink it"
        )
    return what, image


def _file_of(source: Any, events: list[str] | None) -> tuple[str, bytes]:
    """What a file of a picture is called, and its bytes."""
    if isinstance(source, bytes | bytearray | memoryview):
        what, data = f"image of {len(source)} bytes", bytes(source)
    elif isinstance(source, StoredImage):
        what = source.name
        try:
            data = source.read()
        except ImageError:
            raise
        except Exception as error:  # of the file system, of an archive, of a table
            raise ImageError(f"{what} cannot be read: {error}") from error
    elif isinstance(source, str) and source.startswith("data:"):
        head, comma, text = source.partition(",")
        if not comma or not head.endswith(";base64"):
            raise ImageError(f"the data URL that begins with {source[:40]!r} is not data:TYPE;base64,...")
        data = from_base64(text, "a data URL")
        what = f"image of {len(data)} bytes"
    elif isinstance(source, str) and "://" in source:
        raise ImageError(
            f"{source[:200]!r} is an address; download the picture and give its path, or a data URL"
        )
    elif isinstance(source, str | os.PathLike):
        return _read_file(source, events)
    else:
        raise ImageError(
            f"expected a picture (PIL, numpy array, torch tensor, bytes, path, data URL or base64 text) but got "
            f"{type(source).__name__}"
        )
    _check_bytes(len(data), what)
    return what, data


def _read_file(source: str | os.PathLike[str], events: list[str] | None) -> tuple[str, bytes]:
    """A file by its path; text that names none and can only be base64 is taken as such."""
    asked = Path(source)
    if isinstance(source, str) and len(source) >= 64 and not os.path.exists(source):  # noqa: PTH110
        with suppress(ImageError):
            data = from_base64(source)
            return f"image of {len(data)} bytes", data
    path = find_image(asked)
    if path != asked and events is not None:
        events.append("image_suffix_replaced")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"image {path} is not a file")
        _check_bytes(status.st_size, f"image {path}")
        return f"image {path}", path.read_bytes()
    except OSError as error:
        raise ImageError(f"image {path} cannot be read: {error.strerror or error}") from error


def _check_bytes(count: int, what: str) -> None:
    if count > MAX_BYTES:
        raise ImageError(f"{what} has {count} bytes; the limit is {MAX_BYTES}")


def _header(what: str, data: bytes) -> Image.Image:
    """A picture of which only the header has been read."""
    if not data:
        raise ImageError(f"{what} is empty (0 bytes)")
    try:
        with _quiet():
            return Image.open(io.BytesIO(data), formats=_formats())
    except Image.DecompressionBombError as error:
        raise ImageError(f"{what} is too large to decode: {error}") from error
    except Exception as error:
        raise ImageError(
            f"{what} is cut off or not a picture ({', '.join(_formats())}): "
            f"it has {len(data)} bytes and begins with {data[:12]!r}"
        ) from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _quiet() -> Any:
    """Without warnings about EXIF blocks and sizes: harmless, or errors here.

    Filters belong to the whole process, so other threads leave them alone.
    """
    if threading.current_thread() is not threading.main_thread():
        return nullcontext()
    return warnings.catch_warnings(action="ignore")


def _orientation(image: Image.Image) -> Any:
    """As EXIF has it; 1, upright, where that cannot be read."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - a damaged block says nothing
        return 1


def _at_least_two(size: tuple[int, ...]) -> tuple[int, int]:
    return max(size[0], 2), max(size[1], 2)


def _to_rgb(image: Image.Image, what: str) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_levels(np.asarray(image), what)).convert("RGB")
    if image.mode == "PA" or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("RGBA")
    return image.convert("RGB")


def _levels(values: np.ndarray, what: str) -> np.ndarray:
    """Values of any type as 0..255."""
    kind, low, high = values.dtype.kind, values.min(), values.max()
    if kind == "b":
        return values.astype(np.uint8) * 255
    if kind in "iu" and low >= 0 and high <= 65535:
        deep = high > 255 or (kind == "u" and values.dtype.itemsize == 2)
        return (values >> 8 if deep else values).astype(np.uint8)
    if kind == "f" and low >= 0 and (high <= 1 or ONE_COLOUR <= high <= 255):
        return np.rint(values * 255 if high <= 1 else values).astype(np.uint8)
    raise ImageError(
        f"{what} holds {values.dtype} from {low:g} to {high:g}, which are no levels of brightness: expected integers "
        "in 0..255 or 0..65535, or floats in 0..1 or 0..255 (pixel values that are normalised already go to the model)"
    )


def _from_array(given: Any) -> Image.Image:
    """A picture of an array or tensor; channels last or first, and first in doubt where it is a tensor."""
    tensor = not isinstance(given, np.ndarray)
    if tensor:
        given = given.detach().cpu()
        given = (given.float() if given.is_floating_point() else given).numpy()
    array = given
    if array.ndim == 3:
        first, last = array.shape[0] in (1, 3, 4), array.shape[2] in (1, 3, 4)
        if first and (tensor or not last):
            array = array.transpose(1, 2, 0)
        elif not last:
            raise ImageError(
                f"an array of shape {given.shape} is not an image: no axis of 1, 3 or 4 channels"
            )
        array = array[:, :, 0] if array.shape[2] == 1 else array
    elif array.ndim != 2:
        raise ImageError(f"an array of shape {given.shape} is not an image: expected 2 or 3 dimensions")
    if 0 in array.shape:
        raise ImageError(f"an array of shape {given.shape} has no pixels")
    return Image.fromarray(np.ascontiguousarray(_levels(array, "the given array")))


def _of_one_colour(picture: Image.Image) -> bool:
    width, height = picture.size
    places = [(x * (width - 1) // 4, y * (height - 1) // 4) for x in range(5) for y in range(5)]
    few: Any = [picture.getpixel(place) for place in places]  # which nearly always settles it
    if any(max(band) - min(band) >= ONE_COLOUR for band in zip(*few, strict=True)):
        return False
    return all(high - low < ONE_COLOUR for low, high in picture.getextrema())  # type: ignore[misc]
