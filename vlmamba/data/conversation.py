"""From a LLaVA row to messages, with every irregularity of real files handled in one place and counted.

Both spellings are read: ``conversations`` of ``{"from": "human"|"gpt"|"system", "value": ...}`` and
``messages`` of ``{"role": "user"|"assistant"|"system", "content": ...}``; a content may also be a list of
image and text parts, image parts with an ``index`` into the row's images (vsft). ``loss`` or ``weight`` of a turn say
whether an answer is learnt. Rows with video or audio cannot be used.

Events (names in `Conversation.events`, one entry an occurrence):
    image_without_token       the row has images but no ``<image>``: they are put before the first question
    token_without_image       ``<image>`` without an image was taken out (``orphan_tokens="strip"``)
    escaped_literal_image     ``<image>`` that is text (an answer, amid a sentence without image) stays text
    leading_gpt_dropped       the row began with an answer
    trailing_human_dropped    the row ended with a question
    consecutive_turns_merged  two turns of one speaker in a row were joined by a newline
    empty_answer              only the end-of-answer token is supervised
    invalid_unicode           lone surrogates were replaced
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vlmamba.common.vocabulary import IMAGE_TOKEN, RESERVED, Message
from vlmamba.data.types import RowError

ImagePosition = Literal["inline", "front"]
OrphanTokens = Literal["reject", "strip", "literal"]

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_STANDALONE = re.compile(r"\A\s*<image>|^[ \t]*<image>[ \t]*$", re.MULTILINE)
_MEDIA = ("video", "audio")
_MEDIA_TOKEN = re.compile(r"\A\s*<(?:video|audio)>|^[ \t]*<(?:video|audio)>[ \t]*$", re.MULTILINE)
_STRIP = re.compile(r"[ \t]*<image>[ \t]*\n?")


@dataclass(frozen=True)
class Conversation:
    """A row in its regular form: user and assistant alternate, a question first and an answer last.

    Attributes:
        messages: See `vlmamba.data.types.Message`; contents are lists of parts.
        images: Image paths as the row names them, in the order of the image parts.
        events: What was repaired (module docstring).
    """

    messages: list[Message]
    images: tuple[str, ...]
    events: tuple[str, ...]


@dataclass
class _Turn:
    role: str
    parts: list[dict[str, Any]]
    learnt: bool

    def images(self) -> int:
        return sum(part["type"] == "image" for part in self.parts)


def parse_row(row: object, *, orphan_tokens: OrphanTokens = "reject") -> Conversation:
    """Read one row.

    Args:
        row: The parsed JSON value.
        orphan_tokens: What to do with ``<image>`` at the start of a question or alone on a line when the row
            has no image: "reject" the row, "strip" the token, or leave it as "literal" text. Amid a sentence
            it always is text.

    Returns:
        The regular form.

    Raises:
        RowError: The row cannot be used; the message says which key or turn is wrong (place and id are the
            caller's).
    """
    if not isinstance(row, Mapping):
        raise RowError(f"the row is {_kind(row)}, not an object with 'conversations'")
    _refuse_media(row)
    if _flag({k: v for k, v in row.items() if isinstance(v, bool | int | float)}, "the row") is False:
        raise RowError("the row says that nothing of it is to be learnt", kind="no_label")
    events: list[str] = []
    images = _image_names(row)
    turns = _read_turns(row, bool(images), orphan_tokens, events)
    images = _in_order_of_parts(turns, images)
    first = int(turns[0].role == "system")
    while len(turns) > first and turns[first].role == "assistant":
        del turns[first]
        events.append("leading_gpt_dropped")
    turns = _merge(turns, events)
    _match_images(turns, images, events)
    if turns and turns[-1].role == "user":
        images = images[: len(images) - turns.pop().images()]
        events.append("trailing_human_dropped")
    if not any(turn.role == "assistant" for turn in turns):
        raise RowError("no answer to learn from: the row has no question followed by an answer")
    if not any(turn.learnt for turn in turns if turn.role == "assistant"):
        raise RowError("no answer to learn from: all have a loss or weight of 0", kind="no_label")
    return Conversation([_message(turn, events) for turn in turns], tuple(images), tuple(events))


def place_images(messages: list[Message], position: ImagePosition) -> list[Message]:
    """Put the images of each turn where `position` says.

    Args:
        messages: Messages whose contents are lists of parts.
        position: "inline" leaves them where they stand; "front" moves the images of a turn before its text,
            separated by a newline, as LLaVA's preprocessing does.
    """
    if position == "inline":
        return messages
    moved = []
    for message in messages:
        parts = message["content"]
        images = [part for part in parts if part["type"] == "image"]
        if images:
            text = "".join(part["text"] for part in parts if part["type"] == "text").strip()
            parts = images + ([{"type": "text", "text": "\n" + text}] if text else [])
        moved.append({**message, "content": parts})
    return moved


def _kind(value: object) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(
        type(value), f"a number ({value})" if isinstance(value, int | float) else type(value).__name__
    )


def _image_names(row: Mapping[str, Any]) -> list[str]:
    found = [(key, row[key]) for key in ("image", "images") if row.get(key) not in (None, "", [])]
    if not found:
        return []
    (key, value), *other = found
    if other and ([value] if isinstance(value, str) else value) != other[0][1]:
        raise RowError("the row has both 'image' and 'images', and they differ; leave one of them out")
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list):
        raise RowError(f"'{key}' is {_kind(value)}, not a path or a list of paths")
    for i, name in enumerate(names):
        if not isinstance(name, str) or not name:
            what = "an empty string" if name == "" else _kind(name)
            raise RowError(f"'{key}[{i}]' is {what}, not a path")
    return names


def _refuse_media(row: Mapping[str, Any]) -> None:
    for key in row:
        if key in (*_MEDIA, *(f"{word}s" for word in _MEDIA)) and row[key] not in (None, "", []):
            raise RowError(f"the row has '{key}', which no model here sees", kind="video")


def _flag(holder: Mapping[str, Any], place: str) -> bool | None:
    """Whether a row or turn is learnt by its own word; None where it says nothing."""
    said = {key: holder[key] for key in ("loss", "weight") if holder.get(key) is not None}
    if (
        any(value not in (0, 1) for value in said.values())
        or len({bool(value) for value in said.values()}) > 1
    ):
        words = ", ".join(f"{key!r}: {value!r}" for key, value in said.items())
        raise RowError(
            f"{place} has {words}: it is learnt whole (1, true) or not at all (0, false); a source as a whole has a "
            "weight in the recipe"
        )
    return next((bool(value) for value in said.values()), None)


def _read_turns(
    row: Mapping[str, Any], has_images: bool, orphan: OrphanTokens, events: list[str]
) -> list[_Turn]:
    key = next((key for key in ("conversations", "messages") if row.get(key) is not None), "conversations")
    if "conversations" not in row and "messages" not in row:
        raise RowError(
            f"the row has no 'conversations' (and no 'messages'); its keys are {sorted(map(str, row))}"
        )
    raw = row.get(key)
    if not isinstance(raw, list):
        raise RowError(f"'{key}' is {_kind(raw)}, not a list of turns")
    if not raw:
        raise RowError(f"'{key}' is empty")
    turns = []
    for i, turn in enumerate(raw):
        place = f"{key}[{i}]"
        if not isinstance(turn, Mapping):
            raise RowError(f"'{place}' is {_kind(turn)}, not an object with 'from' and 'value'")
        role = _role(turn, place)
        if role == "system" and i > 0:
            raise RowError(f"'{place}' is a system turn; only the first turn may be one")
        learnt = _flag(turn, f"'{place}'")
        if learnt and role != "assistant":
            raise RowError(f"'{place}' is a turn of the {role} that is to be learnt; only answers are")
        parts = _parts(turn, place, role, has_images, orphan, events)
        turns.append(_Turn(role, parts, role == "assistant" and learnt is not False))
    return turns


def _role(turn: Mapping[str, Any], place: str) -> str:
    for key in ("from", "role"):
        if key in turn:
            role = turn[key]
            if isinstance(role, str) and role in _ROLES:
                return _ROLES[role]
            raise RowError(f"'{place}.{key}' is {role!r}; known speakers: {', '.join(_ROLES)}")
    raise RowError(f"'{place}' has no 'from' (or 'role'); its keys are {sorted(map(str, turn))}")


def _parts(
    turn: Mapping[str, Any], place: str, role: str, has_images: bool, orphan: OrphanTokens, events: list[str]
) -> list[dict[str, Any]]:
    key = "value" if "value" in turn else "content"
    if key not in turn:
        raise RowError(f"'{place}' has no 'value' (or 'content'); its keys are {sorted(map(str, turn))}")
    value = turn[key]
    if isinstance(value, list):
        return _listed_parts(value, f"{place}.{key}", role, events)
    if not isinstance(value, str):
        raise RowError(f"'{place}.{key}' is {_kind(value)}, not a string")
    value = _clean(value, f"{place}.{key}", events)
    if role == "user" and (found := _MEDIA_TOKEN.search(value)):
        raise RowError(
            f"'{place}.{key}' has {found.group().strip()}, which no model here sees",
            kind="video",
        )
    if IMAGE_TOKEN not in value:
        return [{"type": "text", "text": value}]
    if role == "user" and has_images:
        return _split(value)
    if role == "user" and orphan != "literal" and (count := len(_STANDALONE.findall(value))):
        if orphan == "reject":
            raise RowError(
                f"'{place}' has {count} {IMAGE_TOKEN} but the row has no 'image'; add the image, take the "
                "token out, or read the source with LLaVASource(orphan_tokens='strip' or 'literal')",
                kind="token_without_image",
            )
        events.extend(["token_without_image"] * value.count(IMAGE_TOKEN))
        return [{"type": "text", "text": _STRIP.sub("", value).strip()}]
    events.extend(["escaped_literal_image"] * value.count(IMAGE_TOKEN))
    return [{"type": "text", "text": value}]


def _listed_parts(value: list[Any], place: str, role: str, events: list[str]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text = _clean(part["text"], f"{place}[{i}].text", events)
            events.extend(["escaped_literal_image"] * text.count(IMAGE_TOKEN))
            parts.append({"type": "text", "text": text})
        elif kind == "image" and role == "user":
            if any(part[k] for k in part if k not in ("type", "index")):
                raise RowError(
                    f"'{place}[{i}]' names its image itself; list the paths under the row's 'image'"
                )
            parts.append({"type": "image", "index": part.get("index")})
        elif kind == "image":
            raise RowError(
                f"'{place}[{i}]' is an image in a turn of the {role}; only questions may show images"
            )
        else:
            media = isinstance(kind, str) and not set(_MEDIA).isdisjoint(kind.split("_"))
            raise RowError(
                f"'{place}[{i}]' is neither {{'type': 'image'}} nor {{'type': 'text', 'text': ...}}, but "
                + (f"of type {kind!r}, which no model here sees" if media else f"{part!r:.80}"),
                kind="video" if media else "shape",
            )
    return parts


def _clean(text: str, place: str, events: list[str]) -> str:
    if not RESERVED.isdisjoint(text):
        codes = ", ".join(f"U+{ord(c):04X}" for c in sorted(RESERVED.intersection(text)))
        raise RowError(
            f"'{place}' holds Unicode noncharacters ({codes}), which are not for interchange: remove them"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        events.append("invalid_unicode")
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _split(text: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(text.split(IMAGE_TOKEN)):
        if i:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _merge(turns: list[_Turn], events: list[str]) -> list[_Turn]:
    merged: list[_Turn] = []
    for turn in turns:
        if merged and merged[-1].role == turn.role:
            if merged[-1].learnt != turn.learnt:
                raise RowError(
                    f"two turns of the {turn.role} follow one another, and only one is to be learnt"
                )
            merged[-1].parts += [{"type": "text", "text": "\n"}, *turn.parts]
            events.append("consecutive_turns_merged")
        else:
            merged.append(turn)
    return merged


def _in_order_of_parts(turns: list[_Turn], images: list[str]) -> list[str]:
    """The images as their parts name them by ``index``, or as they are."""
    parts = [part for turn in turns for part in turn.parts if part["type"] == "image"]
    order = [part.pop("index", None) for part in parts]
    if all(number is None for number in order):
        return images
    for number in order:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(images):
            raise RowError(
                f"an image part has the index {number!r}; all are to be numbers from 0, for the row has "
                f"{len(images)} images",
                kind="image_count",
            )
    if set(order) != set(range(len(images))):
        raise RowError(
            f"image parts show images {sorted(set(order))} of the row's {len(images)}", kind="image_count"
        )
    return [images[number] for number in order]


def _match_images(turns: list[_Turn], images: list[str], events: list[str]) -> None:
    """Check that images and image parts are equally many; without any part, put the images in front."""
    found = sum(turn.images() for turn in turns)
    if images and not found:
        first = next((turn for turn in turns if turn.role == "user"), None)
        if first is not None:
            first.parts = [*({"type": "image"} for _ in images), {"type": "text", "text": "\n"}, *first.parts]
        events.append("image_without_token")
    elif found != len(images):
        raise RowError(
            f"{found} {IMAGE_TOKEN} in the questions but {len(images)} under 'image'; "
            "the numbers must be equal",
            kind="image_count",
        )


def _message(turn: _Turn, events: list[str]) -> Message:
    parts: list[dict[str, Any]] = []
    for part in turn.parts:
        if part["type"] == "text" and parts and parts[-1]["type"] == "text":
            parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
        elif part["type"] == "image" or part["text"]:
            parts.append(dict(part))
    if turn.role == "assistant" and not "".join(part["text"] for part in parts).strip():
        events.append("empty_answer")
        parts = []
    message = {"role": turn.role, "content": parts or [{"type": "text", "text": ""}]}
    return message if turn.learnt or turn.role != "assistant" else {**message, "loss": False}
