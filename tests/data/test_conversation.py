"""Rows of the wrong shape, and the spellings of rows that are accepted."""

from __future__ import annotations

from typing import Any

import pytest

from tests.data.conftest import chat
from vlmamba.data import RowError, parse_row, place_images


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "the row is a list, not an object with 'conversations'"),
        ("x", "the row is a string, not an object"),
        (None, "the row is null, not an object"),
        ({"id": 1}, r"the row has no 'conversations' \(and no 'messages'\); its keys are \['id'\]"),
        ({"conversations": []}, "'conversations' is empty"),
        ({"conversations": "hi"}, "'conversations' is a string, not a list of turns"),
        ({"conversations": None}, "'conversations' is null, not a list"),
        (
            {"conversations": ["hi"]},
            r"'conversations\[0\]' is a string, not an object with 'from' and 'value'",
        ),
        (
            {"conversations": [{"value": "x"}]},
            r"'conversations\[0\]' has no 'from' \(or 'role'\); its keys are \['value'\]",
        ),
        ({"conversations": [{"from": "human"}]}, r"'conversations\[0\]' has no 'value' \(or 'content'\)"),
        (
            {"conversations": [{"from": "human", "value": 3}]},
            r"'conversations\[0\].value' is a number \(3\), not a string",
        ),
        (
            {"conversations": [{"from": "human", "value": None}]},
            r"'conversations\[0\].value' is null, not a string",
        ),
        (
            {"conversations": [{"from": "tool", "value": "x"}]},
            r"'conversations\[0\].from' is 'tool'; known speakers: human, user, gpt, assistant, system",
        ),
        ({"messages": [{"role": 3, "content": "x"}]}, r"'messages\[0\].role' is 3; known speakers"),
        (
            {"conversations": [*chat("q", "a"), {"from": "system", "value": "s"}]},
            r"'conversations\[2\]' is a system turn",
        ),
        ({"conversations": chat("q")}, "no answer to learn from"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "no answer to learn from"),
        (
            {"image": 3, "conversations": chat("q", "a")},
            r"'image' is a number \(3\), not a path or a list of paths",
        ),
        ({"image": ["a", None], "conversations": chat("q", "a")}, r"'image\[1\]' is null, not a path"),
        (
            {"image": ["a", ""], "conversations": chat("q", "a")},
            r"'image\[1\]' is an empty string, not a path",
        ),
        ({"image": {"p": 1}, "conversations": chat("q", "a")}, "'image' is an object, not a path"),
        (
            {"image": ["a", "b"], "conversations": chat("<image>q", "a")},
            "1 <image> in the questions but 2 under 'image'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            r"'messages\[0\].content\[0\]' is neither",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            r"'messages\[0\].content\[0\]' names its image itself; list the paths under the row's 'image'",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "image"}]}]},
            "is an image in a turn of the assistant; only questions may show images",
        ),
    ],
)
def test_wrong_shape(row: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        parse_row(row)


def test_both_spellings_are_the_same() -> None:
    llava = {"image": "a.png", "conversations": [{"from": "system", "value": "S"}, *chat("<image>\nq", "a")]}
    roles = ("system", "user", "assistant")
    messages = [
        {"role": r, "content": t["value"]} for r, t in zip(roles, llava["conversations"], strict=True)
    ]  # type: ignore[index]
    listed = [
        {"role": "system", "content": [text("S")]},
        {"role": "user", "content": [{"type": "image"}, text("\nq")]},
        {"role": "assistant", "content": [text("a")]},
    ]
    assert parse_row(llava).messages == listed
    assert parse_row({"images": ["a.png"], "messages": messages}) == parse_row(llava)
    assert parse_row({"image": "a.png", "messages": listed}) == parse_row(llava)


def test_text_parts_are_literal() -> None:
    row = {
        "messages": [
            {"role": "user", "content": [text("<image>\nwhat?")]},
            {"role": "assistant", "content": "a"},
        ]
    }
    parsed = parse_row(row)
    assert parsed.messages[0]["content"] == [text("<image>\nwhat?")]
    assert parsed.events == ("escaped_literal_image",)


def test_consecutive_turns_of_one_speaker_are_joined() -> None:
    turns = [
        *chat("q"),
        {"from": "human", "value": "r"},
        {"from": "gpt", "value": "a"},
        {"from": "gpt", "value": "b"},
    ]
    parsed = parse_row({"conversations": turns})
    assert [m["content"] for m in parsed.messages] == [[text("q\nr")], [text("a\nb")]]
    assert parsed.events == ("consecutive_turns_merged",) * 2


def test_lone_surrogates_are_replaced() -> None:
    parsed = parse_row({"conversations": chat("a\ud800b", "\U0001f600 ok")})
    assert parsed.messages[0]["content"] == [text("a\ufffdb")]
    assert parsed.messages[1]["content"] == [text("\U0001f600 ok")]
    assert parsed.events == ("invalid_unicode",)


def test_several_images_without_token_precede_the_first_question() -> None:
    parsed = parse_row({"image": ["a", "b"], "conversations": chat("q", "a", "r", "b")})
    assert parsed.messages[0]["content"] == [{"type": "image"}, {"type": "image"}, text("\nq")]
    assert parsed.messages[2]["content"] == [text("r")]


def test_front_moves_images_within_their_turn() -> None:
    parsed = parse_row({"image": ["a", "b"], "conversations": chat("x <image> y", "a", "z\n<image>", "b")})
    front = place_images(parsed.messages, "front")
    assert front[0]["content"] == [{"type": "image"}, text("\nx  y")]
    assert front[2]["content"] == [{"type": "image"}, text("\nz")]
    assert front[1] == parsed.messages[1]
    assert parsed.messages[0]["content"] == [text("x "), {"type": "image"}, text(" y")], (
        "the input is left alone"
    )


def test_front_of_a_turn_that_is_only_an_image() -> None:
    parsed = parse_row({"image": "a", "conversations": chat("<image>", "a")})
    assert place_images(parsed.messages, "front")[0]["content"] == [{"type": "image"}]
