"""Chat templates rendered into segments, so that labels come from the template itself.

A template is Jinja, in the dialect of transformers' chat templates: what the model is to say stands between
``{% generation %}`` and ``{% endgeneration %}``, an image is the text ``<image>``. Rendering gives a list of
segments, each supervised or not; they are tokenised one by one, in training and at inference alike. So labels need
no counting, the ids of a prompt are the same in both, and no text of a user can pose as an image, an end-of-text
token or a turn: such strings are carried through the template as placeholders and come back as plain text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vlmamba.common.vocabulary import IMAGE_TOKEN, RESERVED, Message
from vlmamba.errors import ConfigError, DataError, MissingFileError
from vlmamba.registry import close_matches

# Of `RESERVED`, which text may not contain.
_START, _END, _LITERAL = "\ufdd0", "\ufdd1", 0xFDD2
_MAX_LITERALS = 0xFDF0 - _LITERAL
_PLACEHOLDER = re.compile("([\ufdd2-\ufdef])")
_LITERAL_TEXT = re.compile(f"{_START}(.*?){_END}", re.DOTALL)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of a segment that is tokenised on its own.

    Attributes:
        kind: "text" (special tokens count), "literal" (text of a user that only looks like a special token) or
            "image" (one image).
        text: The text; empty for an image.
    """

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a rendered conversation that is supervised as a whole, or not at all."""

    pieces: tuple[Piece, ...]
    supervised: bool


class _Generation(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}``: puts marks around what the model is to say."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own attribute

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return _START + caller() + _END


def template_names() -> list[str]:
    """Names of the templates that come with vlmamba."""
    folder = resources.files("vlmamba.models") / "templates"
    return sorted(
        entry.name.removesuffix(".jinja") for entry in folder.iterdir() if entry.name.endswith(".jinja")
    )


def load_template(name: str) -> str:
    """The Jinja text of a template that comes with vlmamba, or of a file ``my/template.jinja``.

    Raises:
        ConfigError: There is none of that name (the message lists the names), or it is not Jinja.
        MissingFileError: There is no such file.
    """
    if not name.endswith(".jinja"):
        names = template_names()
        if name not in names:
            raise ConfigError(
                f"unknown chat template {name!r}.{close_matches(name, names)} Known: {', '.join(names)}. A file of "
                "your own is named with its path, my/template.jinja."
            )
        return (resources.files("vlmamba.models") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    file = Path(name)
    if not file.is_file():
        raise MissingFileError(f"there is no chat template {file} (looked in {Path.cwd()}).")
    try:
        text = file.read_text(encoding="utf-8")
        _environment().parse(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: a chat template is text in UTF-8: {error}") from error
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{file}:{error.lineno}: not a Jinja template: {error.message}") from error
    if not marks_answers(text):
        raise ConfigError(
            f"{file}: the chat template marks no answer, so nothing would be learnt: put what the model is to say "
            "between {% generation %} and {% endgeneration %}."
        )
    return text


def marks_answers(template: str) -> bool:
    """Whether a template says what the model is to say, by ``{% generation %}``."""
    return _GENERATION.search(template) is not None


@functools.lru_cache(maxsize=32)
def template_variables(template: str) -> frozenset[str]:
    """Names that a template looks up."""
    return frozenset(jinja2.meta.find_undeclared_variables(_environment().parse(template)))


@functools.lru_cache(maxsize=32)
def _keys(template: str) -> frozenset[str]:
    """What a template may look up in a message: names after a dot, in brackets, in calls (``message.get("name")``)."""
    tree = _environment().parse(template)
    names = {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
    looked_up = [node.arg for node in tree.find_all(jinja2.nodes.Getitem)]
    looked_up += [inner for node in tree.find_all(jinja2.nodes.Call) for inner in node.args]
    names |= {n.value for n in looked_up if isinstance(n, jinja2.nodes.Const) and isinstance(n.value, str)}
    return frozenset(names - {"text", "type"})


class _Undefined(jinja2.Undefined):
    """May be tested, as templates do (``{% if tools %}``), but neither written nor looped over."""

    __str__ = __iter__ = __len__ = jinja2.Undefined._fail_with_undefined_error


@functools.lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
        undefined=_Undefined,
    )
    environment.globals["raise_exception"] = raise_exception
    return environment


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def plain_messages(messages: Any, template: str) -> list[Message]:
    """Messages in the one form that templates know: OpenAI's images as ours, without what is null.

    Nothing is dropped: a message has a role, a content, perhaps a loss, and what its template looks up; a part is text
    (``{"type": "text", "text": ...}``), an image (``image``, ``path``, ``url`` or ``base64``, or none where images come
    beside the text) or OpenAI's ``image_url``.

    Raises:
        DataError: It is none of this; the message says which message, part and key.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"a conversation is a list of messages, not {messages!r:.80}")
    found: list[Message] = []
    images = 0
    for number, message in enumerate(messages):
        where = f"message {number}"
        plain = _without_nulls(message, where)
        if not isinstance(plain.get("role"), str):
            raise DataError(f"{where} has no role: {message!r:.80}")
        where = f"{where} (of the {plain['role']})"
        content = plain.get("content")
        if not isinstance(content, str | list | tuple):
            raise DataError(f"{where}: content is {content!r:.80}, not a text or a list of parts")
        _refuse_keys(plain, {"role", "content", "loss", *_keys(template)}, where)
        if not isinstance(content, str):
            plain["content"] = [
                _plain_part(part, f"{where}, part {place}") for place, part in enumerate(content)
            ]
            for part in plain["content"]:
                if part["type"] == "image":
                    if part.pop("index", images) != images:
                        raise DataError(
                            f"{where}: images are given in the order of their parts; leave out index"
                        )
                    images += 1
        found.append(plain)
    return found


IMAGE_KEYS = ("image", "path", "url", "base64")


def _plain_part(part: Any, where: str) -> dict[str, Any]:
    plain = _without_nulls(part, where)
    kind = plain.get("type")
    if kind == "image_url":
        _refuse_keys(plain, {"type", "image_url"}, where)
        url = plain.get("image_url")
        if isinstance(url, Mapping):
            _refuse_keys({k: v for k, v in url.items() if (k, v) != ("detail", "auto")}, {"url"}, where)
            url = url.get("url")
        if not isinstance(url, str):
            raise DataError(f"{where}: image_url holds no url")
        return {"type": "image", "url": url}
    if kind == "image":
        _refuse_keys(plain, {"type", "index", *IMAGE_KEYS}, where)
        if sum(key in plain for key in IMAGE_KEYS) > 1:
            raise DataError(
                f"{where} holds several images: {', '.join(key for key in IMAGE_KEYS if key in plain)}"
            )
        return plain
    if kind != "text":
        known = ["text", "image", "image_url"]
        raise DataError(
            f"{where} is of type {kind!r}, which is not known here.{close_matches(str(kind), known)} Known: "
            f"{', '.join(known)}."
        )
    _refuse_keys(plain, {"type", "text"}, where)
    if not isinstance(plain.get("text"), str):
        raise DataError(f"{where}: text is {plain.get('text')!r:.80}, not a text")
    return plain


def _without_nulls(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is {value!r:.80}, not a dictionary")
    return {key: item for key, item in value.items() if item is not None}


def _refuse_keys(given: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise DataError(
                f"{where}: {key!r} has no meaning here.{close_matches(str(key), sorted(known))} Known: "
                f"{', '.join(sorted(known))}."
            )


def render_segments(
    template: str,
    messages: Sequence[Message],
    *,
    special_tokens: Sequence[str] = (),
    add_generation_prompt: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> list[Segment]:
    """Render a conversation into supervised and unsupervised segments.

    Args:
        template: Jinja text of the chat template.
        messages: ``{"role", "content"}`` each; content is a string or a list of ``{"type": "image"}`` and
            ``{"type": "text", "text": ...}``. Text is taken literally, whatever it looks like. An answer with
            ``"loss": False`` is not supervised.
        special_tokens: Strings that the tokenizer treats as special; in message text they stay plain text.
        add_generation_prompt: End with what precedes the next answer.
        variables: Further template variables (``eos_token``, ``bos_token``).

    Returns:
        The segments in order; empty ones are left out.

    Raises:
        DataError: The template refuses the conversation, or text holds one of Unicode's noncharacters.
    """
    # Longest first, so that a token which contains another one is taken whole.
    literals = sorted({IMAGE_TOKEN, *special_tokens} - {""}, key=len, reverse=True)
    escape = _Escaper(literals)
    safe = [{**m, "content": escape.content(m.get("content", ""))} for m in messages]
    try:
        text = _compiled(template).render(
            messages=safe, add_generation_prompt=add_generation_prompt, **dict(variables or {})
        )
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        RecursionError,
    ) as error:
        roles = [m.get("role") for m in messages]
        raise DataError(f"the chat template refuses this conversation: {error} (roles: {roles})") from error
    parts = text.split(_START)
    learnt = [m.get("loss") is not False for m in messages if m.get("role") == "assistant"]
    if not all(learnt) and len(learnt) != len(parts) - 1:
        raise DataError(
            f"some answers have a loss of false, but the chat template writes {len(parts) - 1} for {len(learnt)} "
            "messages of the assistant: put each between {% generation %} and {% endgeneration %}"
        )
    segments: list[Segment] = []
    for index, part in enumerate(parts):
        inside, _, outside = part.partition(_END) if index else ("", "", part)
        segments.append(
            Segment(escape.pieces(inside), supervised=index == 0 or all(learnt) or learnt[index - 1])
        )
        segments.append(Segment(escape.pieces(outside), supervised=False))
    return [segment for segment in segments if segment.pieces]


class _Escaper:
    """Carries strings of users that look like special tokens through a template."""

    def __init__(self, literals: Sequence[str]) -> None:
        self.literals = literals
        self.used: list[str] = []

    def content(self, content: Any) -> Any:
        if isinstance(content, str):
            return self.text(content)
        return [
            {**part, "text": self.text(part["text"])} if part.get("type") == "text" else part
            for part in content
        ]

    def text(self, text: str) -> str:
        found = RESERVED.intersection(text)
        if found:
            codes = ", ".join(f"U+{ord(c):04X}" for c in sorted(found))
            raise DataError(
                f"text holds Unicode noncharacters ({codes}), which are not for interchange: remove them"
            )
        for literal in self.literals:
            if literal in text:
                if literal not in self.used:
                    if len(self.used) == _MAX_LITERALS:
                        raise DataError(
                            f"more than {_MAX_LITERALS} different special tokens stand in one conversation"
                        )
                    self.used.append(literal)
                text = text.replace(literal, chr(_LITERAL + self.used.index(literal)))
        return text

    def pieces(self, text: str) -> tuple[Piece, ...]:
        """Split rendered text at images (the template's) and escaped literals (the user's)."""
        pieces: list[Piece] = []
        for part in _PLACEHOLDER.split(text):
            if _PLACEHOLDER.fullmatch(part):
                pieces.append(Piece("literal", self.used[ord(part) - _LITERAL]))
            else:
                pieces += split_images(part)
        return tuple(pieces)


def split_images(text: str) -> tuple[Piece, ...]:
    """Split text in which ``<image>`` stands for images."""
    pieces: list[Piece] = []
    for index, part in enumerate(text.split(IMAGE_TOKEN)):
        pieces += [Piece("image", "")] if index else []
        pieces += [Piece("text", part)] if part else []
    return tuple(pieces)


def plain_text(segments: Sequence[Segment], *, marked: bool = False) -> str:
    """The rendered conversation as one string, images as ``<image>``.

    Args:
        segments: Of `render_segments`.
        marked: Put text of a user that only looks like a special token between two noncharacters (U+FDD0, U+FDD1),
            so that `pieces_of` reads the string as what it is.
    """
    literal = (_START, _END) if marked else ("", "")
    return "".join(
        {"image": IMAGE_TOKEN, "literal": piece.text.join(literal)}.get(piece.kind, piece.text)
        for segment in segments
        for piece in segment.pieces
    )


def pieces_of(text: str) -> tuple[Piece, ...]:
    """The pieces of a marked string of `plain_text`, or of one that was put together by hand."""
    pieces: list[Piece] = []
    for index, part in enumerate(_LITERAL_TEXT.split(text)):
        pieces += [Piece("literal", part)] if index % 2 else split_images(part)
    return tuple(pieces)
