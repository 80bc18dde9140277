"""Pictures from untrusted files."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from vlmamba.data import download_hint, open_image, resolve_image_path
from vlmamba.errors import ImageError


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "name", ["../x.png", "a/../../x.png", "..\\x.png", "a\\..\\..\\x.png", "/x.png", "..", ".", "/"]
)
def test_paths_outside_the_root_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.png").touch()
    with pytest.raises(ImageError, match=r"leaves its root: it means .* which is outside"):
        resolve_image_path(tmp_path / "root", name)


@pytest.mark.parametrize("name", ["a\0.png", "", "  "])
def test_names_that_are_no_paths(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError, match="is not a path"):
        resolve_image_path(tmp_path, name)


def test_a_sibling_folder_with_the_same_beginning_is_outside(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="leaves its root"):
        resolve_image_path(tmp_path / "root", "../root2/x.png")


def test_paths_inside_the_root(tmp_path: Path) -> None:
    for name in ("a/b.png", "a\\b.png", "./a/b.png", "a/c/../b.png", f"{tmp_path}/a/b.png"):
        assert resolve_image_path(tmp_path, name) == tmp_path / "a" / "b.png"


def test_links_are_followed_unless_forbidden(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "disk" / "x.png").write_bytes(encoded(Image.new("RGB", (4, 4)), "PNG"))
    (tmp_path / "root" / "coco").symlink_to(tmp_path / "disk")
    assert open_image(resolve_image_path(tmp_path / "root", "coco/x.png")).size == (4, 4)
    with pytest.raises(ImageError, match=r"leaves its root through a link: it means .*disk/x.png"):
        resolve_image_path(tmp_path / "root", "coco/x.png", allow_symlinks=False)


def test_missing_file_and_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(
        ImageError, match=r"image .*x\.jpg does not exist \(nor with another of \.jpg, \.jpeg, \.png"
    ):
        open_image(tmp_path / "x.jpg")
    with pytest.raises(
        ImageError, match=r"there is no folder .*train2017. Get it from http://images.cocodataset.org"
    ):
        open_image(tmp_path / "coco" / "train2017" / "1.jpg")
    with pytest.raises(ImageError, match="does not exist"):
        open_image(tmp_path / ("x" * 300 + ".jpg"))


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png", ".gif", ".webp", ".JPG", ".PNG"])
def test_other_suffixes_are_tried(tmp_path: Path, suffix: str) -> None:
    kind = {".jpg": "JPEG", ".jpeg": "JPEG"}.get(suffix.lower(), suffix[1:].upper())
    (tmp_path / f"1{suffix}").write_bytes(encoded(Image.new("RGB", (4, 4)), kind))
    events: list[str] = []
    assert open_image(tmp_path / "1.bmp", events=events).size == (4, 4)
    assert events == ["image_suffix_replaced"]


def test_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ImageError, match="is not a file"):
        open_image(tmp_path / "folder.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="is not a file"):
        open_image(tmp_path / "pipe.png")


def test_truncated_jpeg() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, "JPEG")
    assert open_image(data).size == (64, 64)
    with pytest.raises(ImageError, match=r"is corrupt or cut off: .*truncated"):
        open_image(data[: len(data) // 2])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_cut_files_of_every_format_are_image_errors(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    assert open_image(data).size == (32, 32)
    for size in (1, 10, 30, len(data) // 2):
        with pytest.raises(ImageError):
            open_image(data[:size])


def test_a_web_page_saved_as_a_picture() -> None:
    with pytest.raises(ImageError, match=r"not a picture .* begins with b'<!DOCTYPE ht'"):
        open_image(b"<!DOCTYPE html><p>404</p>")
    with pytest.raises(ImageError, match=r"is empty \(0 bytes\)"):
        open_image(b"")


def test_damaged_files_are_image_errors_or_pictures() -> None:
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    outcomes = set()
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF") * 20:
        data = bytearray(encoded(noise, kind))
        for place in generator.integers(0, 400, 5):
            data[place] = int(generator.integers(256))
        try:
            outcomes.add(open_image(bytes(data), exif_transpose=True).mode)
        except ImageError:
            outcomes.add("error")
    assert outcomes == {"RGB", "error"}


def test_postscript_is_never_run() -> None:
    with pytest.raises(ImageError, match="not a picture"):
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n")


def test_bombs_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Image.MAX_IMAGE_PIXELS
    data = encoded(Image.new("RGB", (20, 20)), "PNG")
    with pytest.raises(
        ImageError, match=r"is 20 x 20 = 400 pixels; the limits are 399 pixels .* or raise max_pixels"
    ):
        open_image(data, max_pixels=399)
    assert open_image(data, max_pixels=400).size == (20, 20)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("was decoded"))
    with pytest.raises(ImageError, match=r"is 12000 x 12000 = 144000000 pixels"):
        open_image(png_header(12_000, 12_000))
    with pytest.raises(ImageError, match="too large to decode"):
        open_image(png_header(60_000, 60_000))
    with pytest.raises(ImageError, match=r"is 30000 x 1 .*16384 a side"):
        open_image(png_header(30_000, 1))
    assert before == Image.MAX_IMAGE_PIXELS


def test_modes_become_rgb() -> None:
    assert open_image(encoded(Image.new("CMYK", (4, 4), (255, 0, 0, 0)), "JPEG")).getpixel((1, 1))[0] < 20  # type: ignore[index]
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_image(encoded(clear, "PNG")).getpixel((0, 0)) == (255, 0, 0)
    half = Image.new("LA", (4, 4), (30, 128))
    assert open_image(encoded(half, "PNG")).getpixel((0, 0)) == (30, 30, 30)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([9, 8, 7, 200, 0, 0])
    palette.putpixel((1, 1), 1)
    assert open_image(encoded(palette, "PNG")).getpixel((0, 0)) == (9, 8, 7)
    picture = open_image(encoded(palette, "PNG", transparency=0))
    assert picture.getpixel((0, 0)) == (9, 8, 7)
    assert picture.getpixel((1, 1)) == (200, 0, 0)
    assert open_image(encoded(Image.new("1", (4, 4), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 257], [32_896, 65_535]], dtype=np.uint16)
    image = open_image(encoded(Image.fromarray(values), "PNG"))
    assert np.asarray(image)[..., 0].tolist() == [[0, 1], [128, 255]]
    unit = Image.fromarray(np.array([[0.0, 1.0], [0.5, float("nan")]], dtype=np.float32))
    assert np.asarray(open_image(encoded(unit, "TIFF")))[..., 0].tolist() == [[0, 255], [128, 0]]


def test_thin_pictures_are_widened() -> None:
    assert open_image(Image.new("RGB", (1, 9))).size == (2, 9)
    assert open_image(Image.new("L", (1, 1))).size == (2, 2)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ((250, 0, 0), (0, 250, 0))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(data).getpixel((0, 0)) == (250, 0, 0)


def test_download_hints() -> None:
    assert "train_val_images.zip" in (download_hint("data/textvqa/train_images") or "")
    assert (download_hint("x/vg/VG_100K_2/1.jpg") or "").endswith("images2.zip")
    assert download_hint("somewhere/else") is None
