"""The inspect verb: pictures, page and raw maps of an answer; misfits in one line."""

import json
import re

import pytest
from PIL import Image

from vlmamba.cli import main
from vlmamba.testing import tiny_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    model, processor = tiny_model("qmamba")
    model.save_pretrained(folder / "export")
    processor.save_pretrained(folder / "export")
    Image.linear_gradient("L").resize((40, 20)).save(folder / "picture.png")
    return folder


def inspect(run, *words):
    picture = ["--image", str(run / "picture.png"), "--question", "what <b>is</b> this?"]
    return main(["inspect", str(run), *picture, "--max-new-tokens", "3", "--device", "cpu", *words])


def test_a_page_pictures_and_maps(run, tmp_path, capsys):
    assert inspect(run, "--output", str(tmp_path)) == 0
    raw = json.loads((tmp_path / "maps.json").read_text(encoding="utf-8"))
    tokens = range(len(raw["tokens"]))
    names = ["hidden-attention", "gradient", "gradient-x-input", "cross-attention"]
    assert [(m["token"], m["method"]) for m in raw["maps"]] == [(t, n) for t in tokens for n in names]
    assert all(len(m["values"]) == 4 == len(m["values"][0]) for m in raw["maps"])
    for token in tokens:
        with Image.open(tmp_path / f"token{token}-gradient-image0.png") as picture:
            assert picture.size == (400, 200)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "what &lt;b&gt;is&lt;/b&gt; this?" in page
    assert page.count('type="radio"') == len(tokens)
    assert page.count("data:image/png;base64,") == len(raw["maps"])
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert f"{len(raw['maps'])} maps:" in capsys.readouterr().out


def test_one_token_one_method_every_layer(run, tmp_path):
    words = ["--answer", "1", "--method", "hidden-attention", "--layer", "all", "--output", str(tmp_path)]
    assert inspect(run, *words) == 0
    found = json.loads((tmp_path / "maps.json").read_text(encoding="utf-8"))["maps"]
    assert [(m["token"], m["method"]) for m in found] == [
        (1, "hidden-attention layer 0"),
        (1, "hidden-attention layer 1"),
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--layer", "7"], "layer 7 is out of range: the language model has 2 layers, 0 to 1"),
        (["--layer", "x"], "--layer is 'x'; it must be a number from 0 or 'all'"),
        (["--method", "gradient", "--layer", "0"], "method 'gradient' has no layers to choose from"),
        (["--answer", "50"], "answer token 50 is out of range: the answer has"),
        (["--image", "nowhere.png"], "nowhere.png"),
    ],
)
def test_errors_are_one_line(run, words, says, tmp_path, capsys):
    assert inspect(run, *words, "--output", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error


def test_a_question_without_an_image_is_refused(run, capsys):
    assert main(["inspect", str(run), "--question", "what?", "--device", "cpu"]) == 2
    assert "the question has no image: give one (--image PATH)" in capsys.readouterr().err
