from __future__ import annotations

import importlib
import logging
import tomllib
import types
from pathlib import Path

import pytest
from PIL import Image

from vlmamba.common.load import load_model
from vlmamba.errors import ConfigError, DataError, MissingDependencyError
from vlmamba.evaluation import Sample, image_first
from vlmamba.evaluation.generation import encode_question, generate_answers
from vlmamba.evaluation.likelihood import encode_options, score_options
from vlmamba.integrations.lmms_eval import _settings

QUESTIONS = ["What is in the image?", "Where is the seven?", "How many digits are there? Two?", "Where?"]
GREEDY = {
    "max_new_tokens": 8,
    "temperature": 0,
    "do_sample": False,
    "until": ["\n\n"],
    "image_aspect_ratio": "original",
}


def instance(*arguments):
    return types.SimpleNamespace(args=arguments)


def documents(pictures):
    return [{"question": q, "image": pictures[i % 2]} for i, q in enumerate(QUESTIONS)]


def visual(document):
    return [Image.open(document["image"])]


def messages(document):
    return [
        {
            "role": "user",
            "content": [
                {"type": "image", "url": visual(document)[0]},
                {"type": "text", "text": document["question"]},
            ],
        }
    ]


def make(plugin, name, checkpoint, pictures, **options):
    model = getattr(plugin, name)(pretrained=str(checkpoint), device="cpu", **options)
    model.task_dict["demo"] = {"test": documents(pictures)}
    return model


def samples(pictures):
    return [Sample(i, (d["image"],), d["question"]) for i, d in enumerate(documents(pictures))]


@pytest.fixture()
def expected(checkpoint, pictures):
    """What the harness of vlmamba generates."""
    model, processor = load_model(checkpoint)
    questions = [encode_question(processor, s, image_first(s)) for s in samples(pictures)]
    return [reply.text for reply in generate_answers(model, processor, questions, max_new_tokens=8)]


def test_the_entry_point_names_both_classes(lmms_eval):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["vlmamba"].partition(":")
    manifest = getattr(importlib.import_module(module), name)()
    assert manifest.model_id == "vlmamba"
    for path, simple in ((manifest.simple_class_path, True), (manifest.chat_class_path, False)):
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name).is_simple is simple


def test_simple_and_chat_answer_as_vlmamba_itself_does(lmms_eval, checkpoint, pictures, expected):
    simple = make(lmms_eval, "VLMambaSimple", checkpoint, pictures, batch_size="2")
    given = simple.generate_until(
        [instance(q, dict(GREEDY), visual, i, "demo", "test") for i, q in enumerate(QUESTIONS)]
    )
    chat = make(lmms_eval, "VLMambaChat", checkpoint, pictures, batch_size="auto")
    requests = [instance(q, messages, dict(GREEDY), i, "demo", "test") for i, q in enumerate(QUESTIONS)]
    assert given == expected == chat.generate_until(requests)
    assert len(set(given)) > 2
    assert chat.generate_until(requests[::-1]) == expected[::-1]


def test_answers_end_where_the_task_says(lmms_eval, checkpoint, pictures, expected):
    model = make(lmms_eval, "VLMambaSimple", checkpoint, pictures)
    stop = expected[0][2:4]
    settings = [{**GREEDY, "until": stop}, {**GREEDY, "max_new_tokens": 2}]
    given = model.generate_until([instance(QUESTIONS[0], s, visual, 0, "demo", "test") for s in settings])
    assert given[0] == expected[0][: expected[0].index(stop)].strip()
    assert len(given[1]) < len(expected[0])
    assert settings[0]["until"] == stop  # the task's own settings are left alone


def test_options_come_back_as_losses(lmms_eval, checkpoint, pictures):
    model = make(lmms_eval, "VLMambaSimple", checkpoint, pictures)
    options = [" red square", " blue", " two dots"]
    requests = [
        instance(QUESTIONS[i], option if i else (lambda doc, o=option: o), visual, i, "demo", "test")
        for i in (0, 1)
        for option in options
    ]
    given = model.loglikelihood(requests)
    loaded, processor = load_model(checkpoint)
    for at, sample in enumerate(samples(pictures)[:2]):
        question = encode_options(processor, sample, image_first(sample), [o.strip() for o in options])
        (scores,) = score_options(loaded, processor, [question])
        mine = given[3 * at : 3 * at + 3]
        assert [loss for loss, _ in mine] == pytest.approx([-s.mean for s in scores], abs=1e-5)
        assert [greedy for _, greedy in mine] == [s.greedy for s in scores]
    losses, greedy = zip(*given, strict=True)  # as its multiple-choice tasks do
    assert all(loss > 0 for loss in losses)
    assert set(greedy) <= {True, False}
    if hasattr(given[0], "text"):  # what lmms-eval 0.7 unwraps
        assert given[0].text == tuple(given[0])
        assert given[0].token_counts is None


def test_sampling_is_taken_where_it_is_asked_for():
    assert _settings({"until": "x", "temperature": 0.0, "top_p": None, "num_beams": 1}) == {
        "max_new_tokens": 1024,
        "until": ["x"],
        "sampling": None,
    }
    assert _settings({"temperature": 0.2, "top_p": 0.9})["sampling"] == {
        "temperature": 0.2,
        "top_p": 0.9,
        "do_sample": True,
    }
    assert _settings({"temperature": 0, "do_sample": True})["sampling"] is None
    assert _settings({"num_beams": 3, "do_sample": False, "temperature": 0})["sampling"] == {
        "num_beams": 3,
        "do_sample": False,
    }


def test_what_it_cannot_do_is_said(lmms_eval, checkpoint, pictures, caplog):
    with pytest.raises(ConfigError, match="name the checkpoint: --model_args pretrained="):
        lmms_eval.VLMambaSimple()
    with caplog.at_level(logging.WARNING):
        model = make(lmms_eval, "VLMambaChat", checkpoint, pictures, odd=1)
    assert "does not know the model_args odd" in caplog.text
    with pytest.raises(ConfigError, match="single rounds only"):
        model.generate_until_multi_round([])
    video = [{"role": "user", "content": [{"type": "video", "url": "x"}]}]
    with pytest.raises(
        DataError, match="demo/test/0: vlmamba reads pictures and text, this message holds 'video'"
    ):
        model.generate_until([instance("q", lambda doc: video, GREEDY, 0, "demo", "test")])
    model.clean()
    with pytest.raises(ConfigError, match="lmms-eval has cleaned this model away"):
        model.generate_until([instance("q", messages, GREEDY, 0, "demo", "test")])


def test_without_lmms_eval_the_message_says_how_to_install_it(monkeypatch):
    if importlib.util.find_spec("lmms_eval") is not None:
        pytest.skip("lmms-eval is installed")
    from vlmamba.integrations import lmms_eval as plugin

    with pytest.raises(MissingDependencyError, match=r"pip install 'vlmamba\[lmms-eval\]'"):
        plugin.manifests()
