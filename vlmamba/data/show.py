"""Samples as training sees them: the exact tokens, those that are learnt marked, in a terminal or a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from vlmamba.common.vocabulary import IGNORE_INDEX, ImageRef, StoredImage
from vlmamba.data.dataset import VLDataset
from vlmamba.data.types import RowError
from vlmamba.errors import ImageError
from vlmamba.pages import embedded, render

GREEN, DIM, BLUE, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[34m", "\x1b[0m"


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
    return render(
        "samples.html",
        title=title,
        samples=[{**vars(shown), "pictures": [_picture(ref) for ref in shown.images]} for shown in samples],
    )


def _picture(ref: ImageRef) -> dict[str, str]:
    try:
        return {"name": _describe(ref), "data": embedded(ref), "problem": ""}
    except ImageError as error:
        return {"problem": str(error)}


def _describe(ref: ImageRef) -> str:
    if isinstance(ref, Path):
        return str(ref)
    if isinstance(ref, StoredImage):
        return ref.name
    return f"{len(ref)} bytes" if isinstance(ref, bytes) else f"{ref.width} x {ref.height}"
