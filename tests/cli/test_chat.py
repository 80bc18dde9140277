"""The chat verb: pictures in a line, turns, commands, one-shot questions."""

import numpy as np
import pytest
from PIL import Image

from vlmamba.cli import chat, main
from vlmamba.errors import ImageError
from vlmamba.evaluation.runner import BatchSize
from vlmamba.integrations.asking import Answerer
from vlmamba.testing import tiny_model


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "my picture.png"
    Image.fromarray(np.zeros((8, 12, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def session():
    model, processor = tiny_model("vss-l2")
    return chat.Session(Answerer(model.eval(), processor, BatchSize(1)), max_new_tokens=4, temperature=0)


def test_paths_are_found_however_they_are_pasted(picture):
    escaped = str(picture).replace(" ", "\\ ")
    url = "file://" + str(picture).replace(" ", "%20")
    for word in (f"'{picture}'", f'"{picture}"', escaped, url):
        assert chat.split_paths(f"{word} what is this?") == ("what is this?", [str(picture)])
    assert chat.split_paths("what's in nowhere.png?") == ("what's in nowhere.png?", [])


def test_a_conversation_goes_on_and_begins_anew(session, picture, capsys):
    session.handle(f"'{picture}' what is this?")
    session.handle("and now?")
    assert [role for role, _ in session.turns] == ["user", "assistant", "user", "assistant"]
    assert [[isinstance(part, str) for part in parts] for _, parts in session.turns[::2]] == [
        [False, True],
        [True],
    ]
    session.handle("/new")
    assert session.turns == []
    assert "(a new conversation)" in capsys.readouterr().out


def test_what_is_printed_is_the_answer_of_generate(session, capsys):
    answer = session.ask("what?")
    model, processor = session.answerer.model, session.answerer.processor
    batch = processor.apply_chat_template(
        [{"role": "user", "content": "what?"}], tokenize=True, add_generation_prompt=True, return_tensors="pt"
    )
    tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert answer == processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert capsys.readouterr().out.strip() == answer


def test_commands(session, picture, capsys):
    session.handle(f"/image {picture}")
    assert len(session.pending) == 1
    session.handle("/system Be brief.")
    assert session.turns[0][0] == "system"
    session.handle("/sing")
    assert "unknown command /sing" in capsys.readouterr().out


def test_pictures_that_cannot_be_read_are_named(session, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    with pytest.raises(ImageError, match=r"broken\.png is cut off or not a picture"):
        session.show(str(broken))
    with pytest.raises(ImageError, match=r"none\.png does not exist"):
        session.show(str(tmp_path / "none.png"))


def test_one_question_from_the_shell(tmp_path, picture, capsys):
    model, processor = tiny_model("mlp")
    model.save_pretrained(tmp_path / "export")
    processor.save_pretrained(tmp_path / "export")
    words = [
        str(tmp_path),
        "--image",
        str(picture),
        "--question",
        "what?",
        "--max-new-tokens",
        "3",
        "--device",
        "cpu",
    ]
    assert main(["chat", *words]) == 0
    assert capsys.readouterr().out.strip()


def test_an_interactive_session_ends_with_the_input(tmp_path, picture, capsys, monkeypatch):
    model, processor = tiny_model("mlp")
    model.save_pretrained(tmp_path / "export")
    processor.save_pretrained(tmp_path / "export")
    lines = iter(["hello", "/image nowhere.png", "/help", ""])

    def read(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert main(["chat", str(tmp_path), "--max-new-tokens", "2", "--device", "cpu"]) == 0
    assert "nowhere.png" in capsys.readouterr().out
