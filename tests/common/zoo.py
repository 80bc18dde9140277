"""Pictures of every kind, written from known pixels, and files that are none, each with what must come of it."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (8, 12, 3), dtype=np.uint8)
GREY = PIXELS[..., 0]
DEEP = RNG.integers(0, 65536, (8, 12, 3), dtype=np.uint16)
ALPHA = RNG.integers(0, 256, (8, 12, 1), dtype=np.uint8)
SMOOTH = np.stack([np.add.outer(range(48), range(64)) * k + 20 for k in (1, 2, 1)], axis=-1).astype(
    np.uint8
)  # what lossy formats keep to a few levels
LEVELS = np.round(np.linspace(0, 255, 96)).reshape(8, 12)

UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}
"""What is seen when stored pixels have an orientation, as the EXIF standard defines it (2.3, tag 0x0112)."""


@dataclass(frozen=True)
class Animal:
    """A file, and what comes of it.

    Attributes:
        data: Its bytes; None for no file at all.
        suffix: Of its name.
        pixels: (H, W, 3) that it shows, None for an error.
        error: Words of that error.
        upright: What it shows with EXIF obeyed, where that differs.
        within: Largest difference of a level that its compression may make.
    """

    data: bytes | None
    suffix: str
    pixels: np.ndarray | None = None
    error: str = ""
    upright: np.ndarray | None = None
    within: int = 0


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The file of a picture."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG written by hand, of whatever Pillow does not write; `rows` are raw samples of all rows."""
    stride = len(rows) // height if height and rows else 0
    raw = b"".join(b"\0" + rows[i * stride : (i + 1) * stride] for i in range(height if rows else 1))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def chunk(name: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def orientation(number: int) -> Image.Exif:
    """EXIF data with an orientation."""
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def three(grey: np.ndarray) -> np.ndarray:
    """A grey picture as RGB."""
    return np.repeat(grey[..., None], 3, axis=2)


def zoo() -> dict[str, Animal]:
    """All of it, by name."""
    rgb, grey, smooth = Image.fromarray(PIXELS), Image.fromarray(GREY), Image.fromarray(SMOOTH)
    few = rgb.quantize(8)
    named = np.asarray(few.convert("RGB"))
    bits = Image.fromarray(GREY > 127)
    black_white = three((GREY > 127).astype(np.uint8) * 255)
    rgba, la = (
        Image.fromarray(np.dstack([PIXELS, ALPHA])),
        Image.fromarray(np.dstack([GREY[..., None], ALPHA]), "LA"),
    )
    cmyk = rgb.convert("CMYK")
    big = DEEP.astype(">u2")
    frames = [Image.fromarray(255 - PIXELS), Image.fromarray(PIXELS // 2)]
    a: dict[str, Animal] = {}

    def seen(name: str, data: bytes, pixels: np.ndarray, **more: Any) -> None:
        a[name] = Animal(data, f".{name.split()[0]}", pixels, **more)

    def broken(name: str, data: bytes | None, error: str) -> None:
        a[name] = Animal(data, f".{name.split()[0]}", None, error)

    for kind, suffix in (("PNG", "png"), ("BMP", "bmp"), ("TIFF", "tif"), ("PPM", "ppm")):
        seen(f"{suffix} RGB", encoded(rgb, kind), PIXELS)
        seen(f"{suffix} grey", encoded(grey, kind), three(GREY))
        seen(f"{suffix} one bit", encoded(bits, kind), black_white)
    for kind, suffix in (("PNG", "png"), ("BMP", "bmp"), ("TIFF", "tif"), ("GIF", "gif")):
        seen(f"{suffix} palette", encoded(few, kind), named)
    for kind, suffix in (("PNG", "png"), ("TIFF", "tif"), ("WEBP", "webp")):
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        seen(f"{suffix} RGBA", encoded(rgba, kind, **options), PIXELS)
    seen("webp lossless", encoded(rgb, "WEBP", lossless=True), PIXELS)
    seen("webp lossy", encoded(smooth, "WEBP", quality=95), SMOOTH, within=12)
    seen("png grey alpha", encoded(la, "PNG"), three(GREY))
    seen(
        "png black on transparent",
        encoded(Image.fromarray(np.dstack([PIXELS * 0, ALPHA])), "PNG"),
        PIXELS * 0,
    )
    seen("png clear colour", encoded(rgb, "PNG", transparency=(1, 2, 3)), PIXELS)
    seen("png clear grey", encoded(grey, "PNG", transparency=7), three(GREY))
    seen("png clear index", encoded(few, "PNG", transparency=0), named)
    seen("png clear palette", encoded(few, "PNG", transparency=bytes(range(0, 240, 30))), named)
    seen("gif clear index", encoded(few, "GIF", transparency=0), named)
    seen("png four bits", encoded(few, "PNG", bits=4), named)
    seen("png two bits grey", png(12, 8, 2, 0, bytes(range(24))), two_bits(bytes(range(24))))
    seen(
        "png 16 bits",
        encoded(Image.fromarray(DEEP[..., 0]), "PNG"),
        three((DEEP[..., 0] >> 8).astype(np.uint8)),
    )
    seen("png 16 bits RGB", png(12, 8, 16, 2, big.tobytes()), (DEEP >> 8).astype(np.uint8))
    deep_alpha = np.dstack([big, big[..., :1]])
    seen(
        "png 16 bits RGBA",
        png(12, 8, 16, 6, deep_alpha.astype(">u2").tobytes()),
        (DEEP >> 8).astype(np.uint8),
    )
    seen(
        "png 16 bits grey alpha",
        png(12, 8, 16, 4, big[..., :2].tobytes()),
        three((DEEP[..., 0] >> 8).astype(np.uint8)),
    )
    seen(
        "png 12 in 16 bits",
        encoded(Image.fromarray(DEEP[..., 0] >> 4), "PNG"),
        three((DEEP[..., 0] >> 12).astype(np.uint8)),
    )
    seen(
        "png one colour",
        encoded(Image.new("RGB", (12, 8), (9, 200, 30)), "PNG"),
        np.full_like(PIXELS, (9, 200, 30)),
    )
    seen("png animated", encoded(rgb, "PNG", save_all=True, append_images=frames), PIXELS)
    seen("webp animated", encoded(rgb, "WEBP", save_all=True, append_images=frames, lossless=True), PIXELS)
    seen("gif animated", encoded(few, "GIF", save_all=True, append_images=frames), named)
    seen("tif pages", encoded(rgb, "TIFF", save_all=True, append_images=frames), PIXELS)
    seen(
        "ppm 16 bits", b"P5 12 8 65535\n" + big[..., 0].tobytes(), three((DEEP[..., 0] >> 8).astype(np.uint8))
    )
    seen(
        "tif 16 bits",
        encoded(Image.fromarray(DEEP[..., 0]), "TIFF"),
        three((DEEP[..., 0] >> 8).astype(np.uint8)),
    )
    seen("tif LZW", encoded(rgb, "TIFF", compression="tiff_lzw"), PIXELS)
    seen("tif CMYK", encoded(cmyk, "TIFF"), np.asarray(cmyk.convert("RGB")))
    for name, top in (("32 bits small", 255), ("32 bits", 65535)):
        values = (LEVELS * (top // 255)).astype(np.int32)
        seen(f"tif {name}", encoded(Image.fromarray(values), "TIFF"), three(LEVELS.astype(np.uint8)))
    for name, top in (("floats", 1.0), ("floats to 255", 255.0)):
        values = (LEVELS / 255 * top).astype(np.float32)
        seen(f"tif {name}", encoded(Image.fromarray(values), "TIFF"), three(LEVELS.astype(np.uint8)))
    seen("jpg RGB", encoded(smooth, "JPEG", quality=95), SMOOTH, within=12)
    seen("jpg progressive", encoded(smooth, "JPEG", quality=95, progressive=True), SMOOTH, within=12)
    seen(
        "jpg grey",
        encoded(Image.fromarray(SMOOTH[..., 0]), "JPEG", quality=95),
        three(SMOOTH[..., 0]),
        within=12,
    )
    seen("jpg CMYK", encoded(smooth.convert("CMYK"), "JPEG", quality=95), SMOOTH, within=12)
    seen(
        "jpg broken EXIF",
        encoded(smooth, "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff"),
        SMOOTH,
        within=12,
    )
    seen("png is a jpeg", encoded(smooth, "JPEG", quality=95), SMOOTH, within=12)
    if "AVIF" in Image.SAVE:
        seen("avif RGB", encoded(smooth, "AVIF", quality=95), SMOOTH, within=12)
    for number, turned in UPRIGHT.items():
        exif = orientation(number)
        seen(
            f"jpg turned {number}",
            encoded(smooth, "JPEG", quality=95, exif=exif),
            SMOOTH,
            upright=turned(SMOOTH),
            within=12,
        )
    seen("png turned 6", encoded(rgb, "PNG", exif=orientation(6)), PIXELS, upright=UPRIGHT[6](PIXELS))
    seen("png palette turned 5", encoded(few, "PNG", exif=orientation(5)), named, upright=UPRIGHT[5](named))
    seen(
        "webp turned 8",
        encoded(rgb, "WEBP", lossless=True, exif=orientation(8)),
        PIXELS,
        upright=UPRIGHT[8](PIXELS),
    )
    seen(
        "tif turned 6", encoded(rgb, "TIFF", exif=orientation(6)), UPRIGHT[6](PIXELS)
    )  # always, see open_image
    seen("png thin", encoded(Image.fromarray(PIXELS[:, :1]), "PNG"), np.repeat(PIXELS[:, :1], 2, 1))
    seen("png flat", encoded(Image.fromarray(PIXELS[:1]), "PNG"), np.repeat(PIXELS[:1], 2, 0))
    seen(
        "png point", encoded(Image.fromarray(PIXELS[:1, :1]), "PNG"), np.broadcast_to(PIXELS[0, 0], (2, 2, 3))
    )

    noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for kind, suffix in (
        ("JPEG", "jpg"),
        ("PNG", "png"),
        ("WEBP", "webp"),
        ("TIFF", "tif"),
        ("BMP", "bmp"),
        ("PPM", "ppm"),
    ):
        whole = encoded(noise, kind)
        broken(f"{suffix} cut", whole[: len(whole) // 2], "cut off")
    broken("gif cut", encoded(noise, "GIF")[:900], "cut off")
    broken("png empty", b"", r"is empty \(0 bytes\)")
    broken("png cut in its header", encoded(rgb, "PNG")[:20], "cut off or not a picture")
    broken("png is a text", b"a caption\n", "not a picture .* begins with b'a caption")
    broken("jpg is a page", b"<!DOCTYPE html><p>404</p>", "begins with b'<!DOCTYPE ht'")
    broken(
        "png is postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\nshowpage\n", "not a picture"
    )
    broken("png is SVG", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "not a picture")
    broken(
        "png broken header",
        png(12, 8, 8, 2, PIXELS.tobytes()).replace(b"\x08\x02", b"\x08\x03", 1),
        "cut off or not a picture|is corrupt",
    )
    broken("png without pixels", png(0, 4, 8, 2, b""), "no pixels|not a picture")
    broken("png bomb", png(60_000, 60_000, 8, 2, b""), "too large to decode")
    broken(
        "png large",
        png(12_000, 12_000, 8, 2, b""),
        "is 12000 x 12000 = 144000000 pixels; the limits are 89478485",
    )
    broken("png long", png(30_000, 1, 8, 2, b""), "is 30000 x 1 .*16384 a side")
    broken(
        "tif floats of no range",
        encoded(Image.fromarray(np.float32(LEVELS - 9)), "TIFF"),
        "float32 from -9 to 246, which are no levels",
    )
    broken(
        "tif floats unclear",
        encoded(Image.fromarray(np.float32(LEVELS / 100)), "TIFF"),
        "which are no levels",
    )
    broken(
        "tif not a number", encoded(Image.fromarray(np.float32(LEVELS * np.nan)), "TIFF"), "from nan to nan"
    )
    broken(
        "tif 32 bits negative", encoded(Image.fromarray(np.int32(LEVELS - 9)), "TIFF"), "int32 from -9 to 246"
    )
    broken("tif 32 bits beyond", encoded(Image.fromarray(np.int32(LEVELS * 9999)), "TIFF"), "int32 from 0 to")
    broken("jpg gone", None, "does not exist")
    return a


def two_bits(packed: bytes) -> np.ndarray:
    """What a grey PNG of two bits shows."""
    bits = np.unpackbits(np.frombuffer(packed, np.uint8).reshape(8, 3), axis=1).reshape(8, 12, 2)
    return three(((bits[..., 0] * 2 + bits[..., 1]) * 85).astype(np.uint8))
