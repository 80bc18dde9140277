"""Samples as training sees them: the exact tokens, those that are learnt marked, in a terminal or a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from vlmamba.common.images import ImageRef, StoredImage, open_image
from vlmamba.common.vocabulary import IGNORE_INDEX
from vlmamba.data.dataset import VLDataset
from vlmamba.data.types import RowError
from vlmamba.errors import ImageError

GREEN, DIM, BLUE, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[34m", "\x1b[0m"
THUMBNAIL = 320


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one kind: "text", "learnt" or "image"."""

    kind: str
    text: str
    tokens: int


@dataclass(frozen=True)
class Shown:
    """A sample to be shown; `problem` says why it cannot be used."""

    title: str
    pieces: tuple[Piece, ...] = ()
    images: tuple[ImageRef, ...] = ()
    events: tuple[str, ...] = ()
    problem: str = ""


def look_at(dataset: VLDataset, index: int) -> Shown:
    """A row as `VLDataset` encodes it."""
    try:
        sample = dataset.sample(index)
        fitted = dataset.fit(sample)
    except RowError as error:
        return Shown(f"row {index}: {error.where} (id {error.id!r})", problem=f"{error.kind}: {error.reason}")
    pieces = tuple(_pieces(dataset.processor, fitted.input_ids, fitted.labels))
    count, learnt = len(fitted.input_ids), fitted.num_supervised
    title = f"row {index}: {sample.where} (id {sample.id!r}): {count} tokens, {learnt} learnt"
    return Shown(title, pieces, fitted.images, (*sample.events, *fitted.events))


def _pieces(processor: Any, ids: Sequence[int], labels: Sequence[int]) -> list[Piece]:
    def kind(place: int) -> str:
        if ids[place] == processor.image_token_id:
            return "image"
        return "learnt" if labels[place] != IGNORE_INDEX and place else "text"

    pieces = []
    for name, places in groupby(range(len(ids)), key=kind):
        tokens = [ids[place] for place in places]
        text = "" if name == "image" else processor.tokenizer.decode(tokens, skip_special_tokens=False)
        pieces.append(Piece(name, text, len(tokens)))
    return pieces


def as_text(shown: Shown, *, color: bool) -> str:
    """For a terminal: what is learnt in green, or between [[ and ]] without colours."""
    lines = [shown.title]
    lines += [f"  image: {_describe(ref)}" for ref in shown.images]
    lines += [f"  repaired: {', '.join(shown.events)}"] if shown.events else []
    if shown.problem:
        return "\n".join([*lines, f"  cannot be used: {shown.problem}"])
    text = "".join(_marked(piece, color) for piece in shown.pieces)
    return "\n".join([*lines, *(f"  {line}" for line in text.split("\n"))])


def _marked(piece: Piece, color: bool) -> str:
    if piece.kind == "image":
        text = f"<{piece.tokens} image tokens>"
        return f"{BLUE}{text}{PLAIN}" if color else text
    if piece.kind == "learnt":
        return f"{GREEN}{piece.text}{PLAIN}" if color else f"[[{piece.text}]]"
    return f"{DIM}{piece.text}{PLAIN}" if color else piece.text


def as_html(samples: Sequence[Shown], *, title: str) -> str:
    """A page of its own, pictures included."""
    style = (
        "body{font:15px sans-serif;margin:2em auto;max-width:60em}article{border-top:1px solid #ccc;padding:1em 0}"
        "pre{white-space:pre-wrap;background:#f6f6f6;padding:.8em}.learnt{background:#c9f0cd}"
        ".image{color:#3a6ea5}.problem{color:#b00020}img{max-height:240px;margin-right:.5em}"
    )
    body = "".join(_article(shown) for shown in samples)
    return (
        (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{style}</style>'
            f'<h1>{escape(title)}</h1><p>What is learnt is <span class="learnt">marked</span>.</p>{body}</html>\n'
        )
        .encode("utf-8", "xmlcharrefreplace")
        .decode("utf-8")
    )  # names that are no text


def _article(shown: Shown) -> str:
    images = "".join(_img(ref) for ref in shown.images)
    if shown.problem:
        inner = f'<p class="problem">cannot be used: {escape(shown.problem)}</p>'
    else:
        spans = "".join(
            f'<span class="image">&lt;{piece.tokens} image tokens&gt;</span>'
            if piece.kind == "image"
            else f'<span class="{piece.kind}" title="{piece.tokens} tokens">{escape(piece.text)}</span>'
            for piece in shown.pieces
        )
        inner = f"<pre>{spans}</pre>"
    repaired = f"<p>repaired: {escape(', '.join(shown.events))}</p>" if shown.events else ""
    return f"<article><h3>{escape(shown.title)}</h3>{images}{repaired}{inner}</article>"


def _img(ref: ImageRef) -> str:
    try:
        picture = open_image(ref)
    except ImageError as error:
        return f'<p class="problem">{escape(str(error))}</p>'
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{escape(_describe(ref), quote=True)}" src="data:image/jpeg;base64,{data}">'


def _describe(ref: ImageRef) -> str:
    if isinstance(ref, Path):
        return str(ref)
    if isinstance(ref, StoredImage):
        return ref.name
    return f"{len(ref)} bytes" if isinstance(ref, bytes) else f"{ref.width} x {ref.height}"
