from __future__ import annotations

import sys

import pytest

from vlmamba.common.load import load_model
from vlmamba.errors import DataError, MissingFileError
from vlmamba.evaluation import Sample, image_first
from vlmamba.evaluation.generation import encode_question, generate_answers
from vlmamba.integrations import vlmevalkit
from vlmamba.integrations.vlmevalkit import main, prompt_text, read_message

RUN = """
import sys
from vlmeval.config import supported_VLM
from vlmeval.vlm import VLMamba
assert __name__ == "__main__"
make = supported_VLM["ours"]
assert make.keywords["device"] == "cpu"
model = make()
assert isinstance(model, VLMamba)
model.set_dump_image(lambda line: [line["path"]])
line = {"path": IMAGE, "question": "Where?", "A": "top", "B": "left", "C": float("nan")}
assert model.use_custom_prompt("MMBench_DEV_EN") and not model.use_custom_prompt("TextVQA_VAL")
message = model.build_prompt(line, "MMBench_DEV_EN")
open(OUT, "w").write(model.generate(message, dataset="MMBench_DEV_EN") + "\\n" + " ".join(sys.argv[1:]))
"""


def test_the_launcher_runs_their_program_with_our_model(vlmeval, checkpoint, pictures, tmp_path):
    run = tmp_path / "run.py"
    run.write_text(RUN.replace("IMAGE", repr(str(pictures[0]))).replace("OUT", repr(str(tmp_path / "out"))))
    before = list(sys.argv)
    words = [
        str(run),
        "--checkpoint",
        str(checkpoint),
        "--name",
        "ours",
        "--device",
        "cpu",
        "--",
        "--data",
        "POPE",
    ]
    assert main(words) == 0
    assert sys.argv == before
    answer, _, arguments = (tmp_path / "out").read_bytes().decode().rpartition("\n")
    assert arguments == "--data POPE --model ours"
    model, processor = load_model(checkpoint)
    text = "Where?\nA. top\nB. left\nAnswer with the option's letter from the given choices directly."
    sample = Sample(0, (pictures[0],), text)
    question = encode_question(processor, sample, image_first(sample))
    (reply,) = generate_answers(model, processor, [question], max_new_tokens=1024)
    assert answer == reply.text


def test_prompts_are_those_of_llava():
    line = {"question": "Is it?", "hint": "Look.", "A": "yes", "B": float("nan"), "C": None, "D": "None"}
    assert prompt_text(line, "Y/N") == "Is it?\nAnswer the question using a single word or phrase."
    assert prompt_text(line, "MCQ") == (
        "Look.\nIs it?\nA. yes\nD. None\nAnswer with the option's letter from the given choices directly."
    )
    assert (
        prompt_text({**line, "hint": float("nan")}, "MCQ", chinese=True)
        == "Is it?\nA. yes\nD. None\n请直接回答选项字母。"
    )


def test_pictures_stand_where_the_message_has_them(pictures):
    request = read_message(
        [
            {"type": "text", "value": "First"},
            {"type": "image", "value": str(pictures[0])},
            {"type": "text", "value": "or <image>?"},
        ]
    )
    assert request.images == (pictures[0],)
    assert [part.get("text", part["type"]) for part in request.messages[0]["content"]] == [
        "First",
        "image",
        "\n",
        "or <image>?",
    ]
    with pytest.raises(DataError, match="this message holds 'video'"):
        read_message([{"type": "video", "value": "x"}])


def test_answer_limits(vlmeval, checkpoint):
    model = vlmevalkit.model_class()(str(checkpoint), device="cpu")
    limits = [model._limit(name) for name in ("POPE", "TextVQA_VAL", "MMVet", "MMBench_DEV_CN", None)]
    assert limits == [128, 128, 1024, 1024, 1024]
    assert vlmevalkit.model_class()(str(checkpoint), max_new_tokens=5)._limit("POPE") == 5


def test_a_missing_program_is_named(tmp_path):
    with pytest.raises(
        MissingFileError, match=r"there is no .*run\.py: give the run\.py of a clone of VLMEvalKit"
    ):
        main([str(tmp_path / "run.py"), "--checkpoint", "x"])
