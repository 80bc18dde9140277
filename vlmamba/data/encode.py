"""From a sample to tensors: pictures, tokens, labels; over-long samples cut.

L tokens of a sample, n images, C channels, S image side.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from vlmamba.common.images import open_image
from vlmamba.common.vocabulary import IGNORE_INDEX, ImageRef, Message
from vlmamba.data.conversation import ImagePosition, place_images
from vlmamba.data.downloads import download_hint
from vlmamba.data.pixels import PixelBuffer
from vlmamba.data.types import Encoded, Item, Processor, RowError, Sample, as_long, row_errors
from vlmamba.errors import ConfigError, ImageError


@dataclass(frozen=True)
class Fitted:
    """A sample's tokens within the maximum length, and the images that are still in it."""

    input_ids: list[int]
    labels: list[int]
    images: tuple[ImageRef, ...]
    events: tuple[str, ...]

    @property
    def num_supervised(self) -> int:
        """Tokens with a label that can be predicted (the first token of a row cannot)."""
        return len(self.labels[1:]) - self.labels[1:].count(IGNORE_INDEX)


class SampleEncoder:
    """Samples to tensors.

    Args:
        processor: See `vlmamba.data.types.Processor`.
        max_length: Longest sample in tokens, image tokens included. Longer ones lose the end of their last
            answer, or whole last turns if pictures stand there; pictures are never cut.
        image_position: "inline" or "front", see `vlmamba.data.conversation.place_images`.
    """

    def __init__(
        self,
        processor: Processor,
        *,
        max_length: int = 2048,
        image_position: ImagePosition = "inline",
    ) -> None:
        if image_position not in ("inline", "front"):
            raise ConfigError(f"image_position is {image_position!r}; it is 'inline' or 'front'")
        if max_length < 2:
            raise ConfigError(f"max_length is {max_length}; it must hold a prompt and an answer")
        self.processor = processor
        self.max_length = max_length
        self.image_position: ImagePosition = image_position

    def encode(self, sample: Sample, buffer: PixelBuffer | None = None) -> Item:
        """Tensors of a sample as its source gives it, its pictures in `buffer`, if given.

        Returns:
            ``input_ids`` (L,), ``labels`` (L,) with -100 where unsupervised, ``pixel_values`` (n, C, S, S) or
            None, ``id``, ``source``, ``row``, ``where``, ``events`` (name -> count).

        Raises:
            RowError: It cannot be used.
        """
        sample = self.place(sample)
        fitted = self.fit(sample)
        events = [*sample.events, *fitted.events]
        pixels = self.load_images(sample, fitted.images, events, buffer)
        return {
            "input_ids": as_long(fitted.input_ids),
            "labels": as_long(fitted.labels),
            "pixel_values": pixels,
            "id": sample.id,
            "source": sample.source,
            "row": sample.row,
            "where": sample.where,
            "events": Counter(events),
        }

    def place(self, sample: Sample) -> Sample:
        """The sample with `image_position` applied."""
        return replace(sample, messages=place_images(sample.messages, self.image_position))

    def fit(self, sample: Sample) -> Fitted:
        """Tokens and labels within `max_length` (the rules are in the class's docstring).

        Raises:
            RowError: Not even one supervised token fits, or the chat template or the tokenizer refuses the row.
        """
        with row_errors(sample.where, sample.id, "template"):
            messages, images = sample.messages, sample.images
            encoded = self.processor.encode_messages(messages)
            self._check(encoded, images, sample)
            prompt, total = _first_label(encoded.labels), len(encoded.input_ids)
            events: list[str] = []
            while self._ends_in_image(encoded):
                shorter = _without_last_exchange(messages)
                if shorter is None:
                    raise self._too_long(sample, prompt, total)
                messages = shorter
                images = images[: _count_images(messages)]
                encoded = self.processor.encode_messages(messages)
                events.append("turns_dropped")
            ids, labels = list(encoded.input_ids), list(encoded.labels)
            if len(ids) > self.max_length:
                labels = labels[: self.max_length]
                end = _last_label(labels) + 1
                ids, labels = ids[:end], labels[:end]
                events.append("truncated")
            fitted = Fitted(ids, labels, images, tuple(events))
            if not fitted.num_supervised:
                raise self._too_long(sample, prompt, total)
            return fitted

    def load_images(
        self,
        sample: Sample,
        images: Sequence[ImageRef],
        events: list[str],
        buffer: PixelBuffer | None = None,
    ) -> torch.Tensor | None:
        """Open and preprocess pictures: (n, C, S, S), or None for none; in `buffer`, if given.

        Raises:
            RowError: One of them cannot be opened.
        """
        if not images:
            return None
        prepare = self.processor.image_processor
        turn = getattr(prepare, "exif_transpose", False)
        opened = open_pictures(sample, images, events, exif_transpose=turn)
        with row_errors(sample.where, sample.id):
            placed = None if buffer is None else buffer.add(prepare, opened)
            return placed if placed is not None else torch.as_tensor(prepare(opened)["pixel_values"])

    def _check(self, encoded: Encoded, images: Sequence[ImageRef], sample: Sample) -> None:
        if encoded.num_images != len(images):
            raise RowError(
                f"the conversation shows {encoded.num_images} images but {len(images)} are given",
                sample.where,
                sample.id,
                "image_count",
            )
        if len(encoded.input_ids) != len(encoded.labels):
            raise AssertionError(
                f"{len(encoded.input_ids)} ids but {len(encoded.labels)} labels from the processor"
            )

    def _ends_in_image(self, encoded: Encoded) -> bool:
        """Whether a cut at `max_length` falls into an image or leaves one that no label follows."""
        if len(encoded.input_ids) <= self.max_length or not encoded.num_images:
            return False
        image = self.processor.image_token_id
        last = max(i for i, token in enumerate(encoded.input_ids) if token == image)
        return last > _last_label(encoded.labels[: self.max_length])

    def _too_long(self, sample: Sample, prompt: int, total: int) -> RowError:
        if total <= self.max_length:
            return RowError("no token of the row can be supervised", sample.where, sample.id, "no_label")
        count, size = len(sample.images), self.processor.num_image_tokens
        images = f" ({count} images of {size} among them)" if count else ""
        reason = (
            f"no supervised token fits: the row has {total} tokens{images}, its first answer begins after "
            f"{prompt}, and max_length is {self.max_length}"
        )
        return RowError(reason, sample.where, sample.id, "too_long")


def open_pictures(
    sample: Sample, images: Sequence[ImageRef], events: list[str], *, exif_transpose: bool = False
) -> list[Image.Image]:
    """Pictures of a sample.

    Raises:
        RowError: One of them cannot be opened; where its folder is missing too, with where that can be had.
    """
    opened = []
    for ref in images:
        try:
            opened.append(open_image(ref, exif_transpose=exif_transpose, events=events))
        except ImageError as error:
            hint = download_hint(ref) if isinstance(ref, Path) and not os.path.isdir(ref.parent) else None  # noqa: PTH112
            reason = f"{error}. Get it from {hint}" if hint else str(error)
            raise RowError(reason, sample.where, sample.id, "image") from error
    return opened


def _first_label(labels: Sequence[int]) -> int:
    return next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))


def _last_label(labels: Sequence[int]) -> int:
    return next((i for i in range(len(labels) - 1, -1, -1) if labels[i] != IGNORE_INDEX), -1)


def _count_images(messages: Sequence[Message]) -> int:
    return sum(
        part["type"] == "image"
        for m in messages
        if not isinstance(m["content"], str)
        for part in m["content"]
    )


def _without_last_exchange(messages: Sequence[Message]) -> list[Message] | None:
    """The messages without the last question and what follows it, or None if that was the only one."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=0)
    return list(messages[:last]) if any(m["role"] == "assistant" for m in messages[:last]) else None
