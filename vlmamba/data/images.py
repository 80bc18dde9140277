"""Opening pictures from untrusted annotation files: nothing outside the root, no bombs, no half-read image.

No global state of Pillow is read or changed here: limits are checked from the header before anything is
decoded, and only raster formats that Pillow decodes itself are tried (never EPS, which would start another
program).
"""

from __future__ import annotations

import functools
import io
import os
import re
import stat
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vlmamba.data.downloads import download_hint
from vlmamba.data.types import ImageRef, LazyImage
from vlmamba.errors import ImageError

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")
SIBLING_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp")
MAX_PIXELS = 89_478_485  # Pillow's own default limit: a quarter of a gigabyte as RGB
MAX_BYTES = 1 << 28
MAX_SIDE = 16_384  # padding to a square would make a thin strip a bomb

_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    struct.error,
    zlib.error,
    RuntimeError,
    MemoryError,
    Image.DecompressionBombError,
)
_DRIVE = re.compile(r"^[A-Za-z]:")


def resolve_image_path(root: Path, name: str, *, allow_symlinks: bool = True) -> Path:
    """The file that an annotation row means; backslashes count as slashes.

    The check is made on names: ``..`` cannot leave the root, whatever the disk looks like. Symbolic links
    inside the root are followed by default, because image folders are commonly linked from other disks.

    Args:
        root: The image root.
        name: The path in the row, relative to the root (an absolute path inside the root is accepted).
        allow_symlinks: False: the file's real path must be inside the root's real path too.

    Raises:
        ImageError: The path leaves the root, is a URL, or is no path.
    """
    if "\0" in name or not name.strip():
        raise ImageError(f"image path {name!r} is not a path")
    if "://" in name:
        raise ImageError(
            f"image path {name!r} is an address; download the image and give its path under {root}"
        )
    slashed = name.replace("\\", "/")
    if _DRIVE.match(slashed) or slashed.startswith("//"):
        raise ImageError(
            f"image path {name!r} is an absolute Windows path; write it relative to the image root {root}"
        )
    base = os.path.normpath(root.absolute())
    resolved = os.path.normpath(os.path.join(base, slashed))  # noqa: PTH118 (normpath has no pathlib form)
    if not _inside(resolved, base):
        raise ImageError(
            f"image path {name!r} leaves its root: it means {resolved}, which is outside {base}. "
            "Write it relative to the root, or move the root up"
        )
    if not allow_symlinks:
        real, real_base = os.path.realpath(resolved), os.path.realpath(base)
        if not _inside(real, real_base):
            raise ImageError(
                f"image path {name!r} leaves its root through a link: it means {real}, outside {real_base}"
            )
    return Path(resolved)


def _inside(path: str, base: str) -> bool:
    return path.startswith(base.rstrip(os.sep) + os.sep)


def find_image(path: Path) -> Path:
    """The path itself, or the file of that name with another image suffix (OCR-VQA: listed .jpg, stored
    .gif).

    Raises:
        ImageError: There is no such file; the message says where its folder can be had.
    """
    if os.path.exists(path):  # noqa: PTH110 (Path.exists raises for names that are too long)
        return path
    for suffix in SIBLING_SUFFIXES:
        for spelled in (suffix, suffix.upper()):
            sibling = path.with_suffix(spelled)
            if os.path.exists(sibling):  # noqa: PTH110
                return sibling
    if path.parent.is_dir():
        raise ImageError(f"image {path} does not exist (nor with another of {', '.join(SIBLING_SUFFIXES)})")
    hint = download_hint(path)
    raise ImageError(
        f"image {path} does not exist: there is no folder {path.parent}"
        + (f". Get it from {hint}" if hint else "")
    )


def open_image(
    ref: ImageRef,
    *,
    max_pixels: int = MAX_PIXELS,
    max_side: int = MAX_SIDE,
    exif_transpose: bool = False,
    events: list[str] | None = None,
) -> Image.Image:
    """Decode a picture completely and convert it to RGB.

    The first frame of an animation; CMYK, palette, grey and 16-bit pictures are converted (16 bits scaled,
    not clipped); transparency is dropped; a side of one pixel is doubled.

    Args:
        ref: File, bytes, how to read them, or an open picture.
        max_pixels: Limit of width x height, checked before decoding.
        max_side: Limit of either side.
        exif_transpose: Turn the picture as its EXIF orientation says (off, as in LLaVA).
        events: Receives "image_suffix_replaced" when the file has another suffix than its row says.

    Returns:
        An RGB picture of at least 2 x 2 pixels.

    Raises:
        ImageError: Missing, not a picture, cut off, too large.
    """
    if isinstance(ref, Image.Image):
        return _prepare(ref, "the given picture", max_pixels, max_side, exif_transpose)
    if isinstance(ref, bytes):
        return _decode(ref, f"image of {len(ref)} bytes", max_pixels, max_side, exif_transpose)
    if isinstance(ref, LazyImage):
        try:
            data = ref.read()
        except OSError as error:
            raise ImageError(f"{ref.what} cannot be read: {error.strerror or error}") from error
        return _decode(data, ref.what, max_pixels, max_side, exif_transpose)
    path = find_image(ref)
    if path != ref and events is not None:
        events.append("image_suffix_replaced")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"image {path} is not a file")
        if status.st_size > MAX_BYTES:
            raise ImageError(f"image {path} has {status.st_size} bytes; the limit is {MAX_BYTES}")
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"image {path} cannot be read: {error.strerror or error}") from error
    return _decode(data, f"image {path}", max_pixels, max_side, exif_transpose)


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _decode(data: bytes, what: str, max_pixels: int, max_side: int, exif_transpose: bool) -> Image.Image:
    if not data:
        raise ImageError(f"{what} is empty (0 bytes)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about EXIF blocks and sizes: either harmless or an error below
        image = _open(data, what)
        return _prepare(image, what, max_pixels, max_side, exif_transpose)


def _open(data: bytes, what: str) -> Image.Image:
    """Read the header."""
    try:
        return Image.open(io.BytesIO(data), formats=_formats())
    except Image.DecompressionBombError as error:
        raise ImageError(f"{what} is too large to decode: {error}") from error
    except _DECODE_ERRORS as error:
        raise ImageError(
            f"{what} is cut off or not a picture ({', '.join(_formats())}): "
            f"it has {len(data)} bytes and begins with {data[:12]!r}"
        ) from error


def _prepare(
    image: Image.Image, what: str, max_pixels: int, max_side: int, exif_transpose: bool
) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels or max(width, height) > max_side:
        raise ImageError(
            f"{what} is {width} x {height} = {width * height} pixels; the limits are {max_pixels} pixels and "
            f"{max_side} a side. Shrink it, or raise max_pixels if you trust the file"
        )
    if not width or not height:
        raise ImageError(f"{what} has no pixels ({width} x {height})")
    try:
        image.load()
        if exif_transpose:
            image = ImageOps.exif_transpose(image)
        image = to_rgb(image)
    except _DECODE_ERRORS as error:
        raise ImageError(f"{what} is corrupt or cut off: {error}") from error
    if min(image.size) < 2:
        image = image.resize((max(image.width, 2), max(image.height, 2)), Image.Resampling.NEAREST)
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB; 16-bit values are scaled to 8 bits.

    Transparency is dropped, not blended, as LLaVA and the encoders' own pipelines do (PIL's `convert`).
    """
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_bytes(np.asarray(image), image.mode)).convert("RGB")
    if image.mode == "PA" or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("RGBA")
    return image.convert("RGB")


def _to_bytes(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values of 16 bits ("I;16"), of 32 bits ("I") or in floating point ("F"), as 0..255."""
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=65535.0, neginf=0.0)
    top = float(values.max(initial=0.0))
    if mode == "F" and top <= 1.0:
        scale = 255.0
    else:
        scale = 1.0 if top <= 255.0 and mode in ("F", "I") else 255.0 / 65535.0
    return np.clip(np.round(values * scale), 0, 255).astype(np.uint8)
