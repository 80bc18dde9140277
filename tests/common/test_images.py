"""Every picture of the zoo through every entrance, and the rules of `open_image` that need no zoo."""

from __future__ import annotations

import ast
import base64
import json
import os
import re
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from tests.common.zoo import PIXELS, SMOOTH, encoded, orientation, zoo
from vlmamba.common import images
from vlmamba.common.images import image_size, open_image
from vlmamba.common.vocabulary import StoredImage
from vlmamba.errors import DataError, ImageError
from vlmamba.models import VLMambaImageProcessor
from vlmamba.testing import tiny_model, tiny_processor

ROOT = Path(__file__).parents[2]
ZOO = zoo()
QUESTION = "USER: <image>\nWhat? ASSISTANT:"


def test_one_function_opens_pictures() -> None:
    """`Image.open`, and what else would open a picture or turn it, stand in one file of the library."""
    elsewhere = {"load_image", "imread", "decode_image", "ImageOps", "Image.open"}
    for path in sorted((ROOT / "vlmamba").rglob("*.py")):
        found = []
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                found += [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute):
                owner = getattr(node.value, "id", getattr(node.value, "attr", ""))
                found += [node.attr, f"{owner}.{node.attr}"]
        assert elsewhere & {*found} == ({"Image.open"} if path.match("common/images.py") else set()), path


# ---- the zoo ----
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    for name, animal in ZOO.items():
        if animal.data is not None:
            (folder / file_of(name)).write_bytes(animal.data)
    rows = [
        {
            "id": name,
            "image": file_of(name),
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "it"}],
        }
        for name in ZOO
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def file_of(name: str) -> str:
    return name.replace(" ", "_") + ZOO[name].suffix


def test_the_zoo_is_large() -> None:
    assert len(ZOO) >= 60 and sum(animal.pixels is None for animal in ZOO.values()) >= 15


@pytest.mark.parametrize("name", ZOO)
def test_what_is_seen_is_what_was_written(folder: Path, name: str) -> None:
    animal = ZOO[name]
    if animal.pixels is None:
        for turned in (False, True):
            with pytest.raises(ImageError, match=animal.error):
                open_image(folder / file_of(name), exif_transpose=turned)
        return
    for turned in (False, True):
        expected = animal.pixels if animal.upright is None or not turned else animal.upright
        events: list[str] = []
        picture = open_image(folder / file_of(name), exif_transpose=turned, events=events)
        assert (picture.mode, picture.info, type(picture)) == ("RGB", {}, Image.Image)
        seen = np.asarray(picture)
        assert seen.shape == expected.shape
        assert np.abs(seen.astype(int) - expected.astype(int)).max() <= animal.within
        assert image_size(folder / file_of(name), exif_transpose=turned) == picture.size
        flat = int(np.ptp(expected.reshape(-1, 3), axis=0).max()) < 16
        assert events == ["image_of_one_colour"] * flat
        again = open_image(picture, exif_transpose=not turned)
        assert again is picture


def entrances(folder: Path, turned: bool) -> dict[str, Any]:
    """Ways to a model: each takes the name of a picture and gives pixel values."""
    from transformers import pipeline
    from transformers.utils.chat_template_utils import Chat

    from vlmamba.cli.chat import Session
    from vlmamba.data import LLaVASource, VLDataset
    from vlmamba.evaluation.generation import encode_question, model_inputs
    from vlmamba.evaluation.runner import BatchSize
    from vlmamba.evaluation.task import Sample, image_first
    from vlmamba.integrations.asking import Answerer, Request

    processor = tiny_processor()
    processor.image_processor.exif_transpose = turned
    model, _ = tiny_model()
    training = VLDataset(LLaVASource(folder / "rows.json", folder), processor, strict=True)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    rows = {name: row for row, name in enumerate(ZOO)}
    path = {name: folder / file_of(name) for name in ZOO}

    def chat(part: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [part, {"type": "text", "text": "\nWhat?"}]}]

    def template(part: dict[str, Any]) -> Any:
        return processor.apply_chat_template(chat(part), tokenize=True, return_tensors="pt")["pixel_values"]

    def evaluate(image: Any) -> Any:
        sample = Sample("q", (image,), "What?")
        return model_inputs(model, processor, [encode_question(processor, sample, image_first(sample))])[
            "pixel_values"
        ]

    answerer = Answerer(model, processor, BatchSize(1))

    def serve(image: Any) -> Any:
        question = answerer.encode(Request.of([("user", [image, "What?"])]))
        return model_inputs(model, processor, [question])["pixel_values"]

    def terminal(name: str) -> Any:
        asked = []

        def write(question: Any, **options: Any) -> Any:
            asked.append(question)
            return SimpleNamespace(text="")

        stub: Any = SimpleNamespace(processor=processor, encode=answerer.encode, write=write)
        session = Session(stub, max_new_tokens=1, temperature=0.0)
        session.show(str(path[name]))
        session.ask("What?")
        return model_inputs(model, processor, asked)["pixel_values"]

    def opened(name: str) -> Any:
        with warnings.catch_warnings(action="ignore"):
            return processor(images=Image.open(path[name]), text=QUESTION, return_tensors="pt")[
                "pixel_values"
            ]

    def data(name: str) -> bytes:
        return path[name].read_bytes()

    def url(name: str) -> str:
        return "data:image/png;base64," + base64.b64encode(data(name)).decode()

    return {
        "training": lambda name: training[rows[name]]["pixel_values"],
        "processor, path": lambda name: processor(images=path[name], text=QUESTION)["pixel_values"],
        "processor, text": lambda name: processor(images=[str(path[name])], text=QUESTION)["pixel_values"],
        "processor, open": opened,
        "image processor": lambda name: processor.image_processor(path[name])["pixel_values"],
        "template, path": lambda name: template({"type": "image", "path": str(path[name])}),
        "template, image": lambda name: template({"type": "image", "image": data(name)}),
        "template, url": lambda name: template({"type": "image", "url": url(name)}),
        "template, image_url": lambda name: template({"type": "image_url", "image_url": {"url": url(name)}}),
        "template, base64": lambda name: template(
            {"type": "image", "base64": base64.b64encode(data(name)).decode()}
        ),
        "pipeline, beside": lambda name: pipe.preprocess({"images": str(path[name]), "text": QUESTION})[
            "pixel_values"
        ],
        "pipeline, chat": lambda name: pipe.preprocess(
            Chat(chat({"type": "image", "path": str(path[name])}))
        )["pixel_values"],
        "evaluation": lambda name: evaluate(path[name]),
        "evaluation, stored": lambda name: evaluate(StoredImage(str(path[name]), lambda: data(name))),
        "server": lambda name: serve(data(name)),
        "terminal": terminal,
    }


@pytest.mark.parametrize("turned", [False, True], ids=["as stored", "as EXIF says"])
def test_every_entrance_sees_the_same(folder: Path, turned: bool, capsys: pytest.CaptureFixture[str]) -> None:
    ways = entrances(folder, turned)
    plain = VLMambaImageProcessor(size=16)
    wrong = []
    for name, animal in ZOO.items():
        if animal.pixels is not None:
            whole = np.asarray(open_image(folder / file_of(name), exif_transpose=turned))
            expected = plain(whole)["pixel_values"]
        for way, give in ways.items():
            if animal.data is None and way not in (
                "training",
                "processor, path",
                "evaluation",
                "terminal",
                "template, path",
            ):
                continue  # no bytes to hand over
            if animal.pixels is not None:
                got = torch.as_tensor(np.asarray(give(name)))
                if got.shape != expected.shape or not torch.equal(got, expected):
                    wrong.append((name, way))
                continue
            try:
                give(name)
            except DataError as error:
                if not re.search(animal.error, str(error)):
                    wrong.append((name, way, str(error)))
            except (OSError, Image.DecompressionBombError):  # of the Image.open that is the user's own
                assert way == "processor, open"
            else:
                wrong.append((name, way, "no error"))
    assert not wrong
    capsys.readouterr()


# ---- rules ----
def test_errors_read_the_same_everywhere(folder: Path) -> None:
    """But for the name of the picture: its path, or its size where only bytes are known."""
    ways = entrances(folder, False)
    for name in ("jpg cut", "png is a text", "png large", "tif floats unclear"):
        said = set()
        for way in (
            "training",
            "processor, path",
            "template, path",
            "template, url",
            "pipeline, beside",
            "evaluation",
            "server",
            "terminal",
        ):
            with pytest.raises(DataError) as caught:
                ways[way](name)
            said.add(re.sub(r"^.*?(image \S+\.\w+|image of \d+ bytes) ", "", str(caught.value)))
        assert len(said) == 1, said


def test_arrays_and_tensors_of_every_layout_are_the_same_picture() -> None:
    float_ = PIXELS.astype(np.float32)
    for given in (
        PIXELS,
        PIXELS.transpose(2, 0, 1),
        torch.tensor(PIXELS),
        torch.tensor(PIXELS).permute(2, 0, 1),
        float_ / 255,
        float_,
        torch.tensor(PIXELS).permute(2, 0, 1).to(torch.float64) / 255,
        PIXELS.astype(np.uint16) * 257,
        PIXELS.astype(np.int64),
    ):
        assert np.array_equal(np.asarray(open_image(given)), PIXELS)
    grey = PIXELS[..., 0]
    for given in (grey, grey[:, :, None], grey[None], grey.astype(">u2") * 256):
        assert np.array_equal(np.asarray(open_image(given))[..., 1], grey)
    assert np.asarray(open_image(grey > 99))[..., 2].tolist() == ((grey > 99) * 255).tolist()
    # A tensor of three rows and three columns has its channels first, an array last.
    cube = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert np.array_equal(np.asarray(open_image(torch.tensor(cube))), cube.transpose(1, 2, 0))
    assert np.array_equal(np.asarray(open_image(cube)), cube)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "but got NoneType"),
        (3.5, "but got float"),
        (np.zeros((2, 3, 4, 5, 6)), r"an array of shape \(2, 3, 4, 5, 6\) is not an image: expected 2 or 3"),
        (np.zeros((8, 9, 7), dtype=np.uint8), r"an array of shape \(8, 9, 7\) is not an image: no axis of 1, 3 or 4"),
        (np.zeros((0, 9, 3), dtype=np.uint8), r"an array of shape \(0, 9, 3\) has no pixels"),
        (np.full((4, 4, 3), -0.3), "the given array holds float64 from -0.3 to -0.3"),
        (np.full((4, 4, 3), 70000), "the given array holds int64 from 70000 to 70000"),
        (np.full((4, 4), np.inf), "holds float64 from inf to inf"),
        (np.zeros((4, 4), dtype=complex), "holds complex128"),
        ("nowhere/a.png", "image nowhere/a.png does not exist: there is no folder nowhere"),
        ("a" * 72, "is cut off or not a picture"),
        ("a." * 40, r"image a\.a\..* does not exist"),
        ("/a" * 9000 + ".", "does not exist"),
        ("http://example.org/a.png", "is an address; download the picture"),
        ("data:image/png,abc", "is not data:TYPE;base64"),
        ("data:image/png;base64,a$b=", "a data URL is not base64"),
        (Image.new("RGB", (0, 4)), r"the given picture has no pixels \(0 x 4\)"),
        (StoredImage("a page of a book", {}.popitem), "a page of a book cannot be read: .*dictionary is empty"),
        (StoredImage("a page", bytes), r"a page is empty \(0 bytes\)"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_named(given: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        open_image(given)
    assert len(str(caught.value)) < 2000
    with pytest.raises(ImageError):
        image_size(given)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(
        ImageError, match=r"image .*x\.jpg does not exist \(nor with another of \.jpg, \.jpeg, \.png"
    ):
        open_image(tmp_path / "x.jpg")
    for name in ("x" * 300 + ".jpg", "a\0b.jpg", "a\ud800.jpg"):
        with pytest.raises(ImageError, match="does not exist"):
            open_image(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("folder.png", "pipe.png"):
        with pytest.raises(ImageError, match="is not a file"):
            open_image(tmp_path / name)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png", ".gif", ".webp", ".tiff", ".JPG", ".PNG"])
def test_one_suffix_of_pictures_may_stand_for_another(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"1{suffix}").write_bytes(encoded(Image.fromarray(PIXELS), "PNG"))
    events: list[str] = []
    assert open_image(tmp_path / "1.bmp", events=events).size == (12, 8)
    assert events == ["image_suffix_replaced"]
    for name in ("1", "1.json", "1.v2"):
        with pytest.raises(ImageError, match=r"does not exist$"):
            open_image(tmp_path / name)


def test_limits_come_before_decoding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    data = encoded(Image.fromarray(PIXELS), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    monkeypatch.setattr(images, "MAX_PIXELS", 96)
    assert open_image(data).size == (12, 8)
    monkeypatch.setattr(images, "MAX_BYTES", len(data) - 1)
    encoded_text = base64.b64encode(data).decode()
    for given in (data, tmp_path / "a.png", StoredImage("x", lambda: data), f"data:;base64,{encoded_text}"):
        with pytest.raises(ImageError, match=rf"has \d+ bytes; the limit is {len(data) - 1}"):
            open_image(given)
    monkeypatch.undo()
    monkeypatch.setattr(images, "MAX_PIXELS", 95)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("was decoded"))
    for given in (data, PIXELS, Image.fromarray(PIXELS), Image.open(tmp_path / "a.png")):
        with pytest.raises(ImageError, match="is 12 x 8 = 96 pixels; the limits are 95 pixels"):
            open_image(given)
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


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


def test_what_is_given_stays_as_it_was() -> None:
    given = Image.open(__import__("io").BytesIO(encoded(Image.fromarray(PIXELS), "PNG", exif=orientation(6))))
    seen = open_image(given, exif_transpose=True)
    assert seen.size == (8, 12) and given.size == (12, 8) and "exif" in given.info
    plain = Image.fromarray(SMOOTH)
    assert open_image(plain) is plain


def test_warnings_of_other_threads_are_left_alone() -> None:
    before = warnings.filters[:]
    threads = [threading.Thread(target=open_image, args=(ZOO["jpg broken EXIF"].data,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters[:] == before


def test_one_colour_is_told_from_nearly_one() -> None:
    for spread, event in ((15, True), (16, False)):
        values = np.full((40, 40, 3), 100, dtype=np.uint8)
        values[17, 23, 1] = 100 + spread
        events: list[str] = []
        open_image(values, events=events)
        assert bool(events) is event
