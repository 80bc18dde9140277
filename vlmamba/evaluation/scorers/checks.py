"""Checks of what scorers are given: lists that belong together, unique ids, texts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from vlmamba.errors import ConfigError, DataError
from vlmamba.registry import close_matches


def check_lengths(**columns: Sequence[Any] | None) -> int:
    """The common length of the lists; those that are None were not given.

    Raises:
        DataError: The lists differ in length, or are empty.
    """
    lengths = {name.replace("_", " "): len(c) for name, c in columns.items() if c is not None}
    listing = ", ".join(f"{length} {name}" for name, length in lengths.items())
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"{listing} do not belong together: give one entry for each question in every list (None as the "
            "prediction of a question that was not answered)"
        )
    if not any(lengths.values()):
        raise DataError(f"nothing to score: {listing}. Check that the file of answers is not empty.")
    return next(iter(lengths.values()))


def check_ids(ids: Sequence[Hashable] | None) -> None:
    """Ids must be unique.

    Raises:
        DataError: Some occur more than once; the message counts them and gives examples.
    """
    if ids is None:
        return
    double = [(key, count) for key, count in Counter(ids).items() if count > 1]
    if double:
        examples = ", ".join(f"{key!r} ({count} times)" for key, count in double[:3])
        raise DataError(
            f"{len(double)} of {len(set(ids))} question ids occur more than once: {examples}. Keep one answer "
            "for each question."
        )


def check_texts(predictions: Sequence[Any], ids: Sequence[Hashable] | None = None) -> None:
    """Predictions must be texts, or None where a question was not answered.

    Raises:
        DataError: One is of another type.
    """
    for index, prediction in enumerate(predictions):
        if prediction is not None and not isinstance(prediction, str):
            raise DataError(
                f"the prediction of {place(ids, index)} is of type {type(prediction).__name__} "
                f"({prediction!r:.40}): give a text, or None where there is no answer"
            )


def check_one_of(
    name: str, values: Sequence[Any], known: Sequence[Any], ids: Sequence[Hashable] | None = None
) -> None:
    """Every value must be a known one.

    Raises:
        DataError: One is not; the message lists the known ones.
    """
    for index, value in enumerate(values):
        if value not in known:
            hint = (
                close_matches(value, [k for k in known if isinstance(k, str)])
                if isinstance(value, str)
                else ""
            )
            listing = ", ".join(repr(k) for k in known)
            raise DataError(
                f"the {name} of {place(ids, index)} is {value!r}.{hint} It must be one of: {listing}."
            )


def check_style(style: str, known: Sequence[str]) -> None:
    """A scorer's `style` must be one it knows.

    Raises:
        ConfigError: It is not; the message lists the known ones.
    """
    if style not in known:
        raise ConfigError(
            f"unknown style {style!r}.{close_matches(style, list(known))} Known: {', '.join(known)}."
        )


def place(ids: Sequence[Hashable] | None, index: int) -> str:
    """How a message names a question."""
    return f"item {index + 1}" if ids is None else f"question {ids[index]!r}"


def check_numbers(
    name: str,
    values: Sequence[Any],
    ids: Sequence[Hashable] | None = None,
    *,
    low: float = -math.inf,
    high: float = math.inf,
) -> None:
    """Values must be finite numbers within bounds, or None where there is none.

    Raises:
        DataError: One is not.
    """
    for index, value in enumerate(values):
        if value is None:
            continue
        if not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
            bounds = f" from {low:g} to {high:g}" if math.isfinite(low) else ""
            raise DataError(
                f"the {name} of {place(ids, index)} is {value!r}: give a finite number{bounds}, or None where "
                "there is none"
            )
