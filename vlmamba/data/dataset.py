"""From rows to tensors: conversation, pictures, tokens, labels; over-long rows cut, bad rows replaced.

L tokens of a sample, n images, C channels, S image side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from vlmamba.data.conversation import ImagePosition, place_images
from vlmamba.data.images import MAX_PIXELS, open_image
from vlmamba.data.mixture import Mixture, as_mixture
from vlmamba.data.types import Encoded, ImageRef, Item, Message, Processor, RowError, Sample, Source, as_long
from vlmamba.errors import ConfigError, DataError, ImageError

IGNORE = -100
MAX_ATTEMPTS = 32


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
        return sum(label != IGNORE for label in self.labels[1:])


class VLDataset(Dataset[Item]):
    """Sources as a map-style data set of tensors.

    A row that cannot be used (wrong shape, missing or corrupt picture, no label left) is replaced by another
    one, chosen by a fixed rule, and reported in the item; `vlmamba.data.ledger.BadSamples` keeps the account
    in the main process. With `strict` it raises at once.

    Args:
        sources: One source, several, or a `Mixture`.
        processor: See `vlmamba.data.types.Processor`.
        max_length: Longest sample in tokens, image tokens included. Longer ones lose the end of their last
            answer, or whole last turns if pictures stand there; pictures are never cut.
        image_position: "inline" or "front", see `vlmamba.data.conversation.place_images`.
        max_pixels: Largest picture that is decoded.
        exif_transpose: Turn pictures as their EXIF data say.
        strict: Raise at the first bad row.
        seed: Of the replacement rule.
    """

    def __init__(
        self,
        sources: Mixture | Source | Sequence[Source],
        processor: Processor,
        *,
        max_length: int = 2048,
        image_position: ImagePosition = "inline",
        max_pixels: int = MAX_PIXELS,
        exif_transpose: bool = False,
        strict: bool = False,
        seed: int = 0,
    ) -> None:
        if image_position not in ("inline", "front"):
            raise ConfigError(f"image_position is {image_position!r}; it is 'inline' or 'front'")
        if max_length < 2:
            raise ConfigError(f"max_length is {max_length}; it must hold a prompt and an answer")
        self.mixture = as_mixture(sources, seed=seed)
        self.processor = processor
        self.max_length = max_length
        self.image_position: ImagePosition = image_position
        self.max_pixels = max_pixels
        self.exif_transpose = exif_transpose
        self.strict = strict
        self.seed = seed
        self._order: np.ndarray | None = None
        self._place: np.ndarray | None = None
        self._text_rows = 0

    def __len__(self) -> int:
        return len(self.mixture)

    def use_lengths(self, lengths: np.ndarray, num_images: np.ndarray) -> None:
        """Let replacements keep the modality and not exceed the length of the row they stand in for.

        Args:
            lengths: Tokens of each row, 0 for rows that cannot be used.
            num_images: Images of each row.
        """
        if len(lengths) != len(self) or len(num_images) != len(self):
            raise DataError(
                f"lengths of {len(lengths)} rows for a data set of {len(self)}; compute them again"
            )
        ties = np.random.default_rng((self.seed, 1)).permutation(len(self))
        order = np.lexsort((ties, lengths, num_images > 0)).astype(np.int64)
        order = order[lengths[order] > 0]
        self._place = np.full(len(self), -1, dtype=np.int64)
        self._place[order] = np.arange(len(order))
        self._order = order
        self._text_rows = int((num_images[order] == 0).sum())

    def __getitem__(self, index: int) -> Item:
        """One sample.

        Returns:
            ``input_ids`` (L,), ``labels`` (L,) with -100 where unsupervised, ``pixel_values`` (n, C, S, S) or
            None, ``id``, ``source``, ``row``, ``where``, ``index`` (as asked), ``used_index`` (differs when
            replaced), ``bad`` (records of the rows that were skipped, for `BadSamples.add`), ``events`` (name
            -> count).

        Raises:
            RowError: The row is bad and the data set is strict.
            DataError: The row and `MAX_ATTEMPTS` replacements are bad.
        """
        bad: list[dict[str, Any]] = []
        for candidate in self._candidates(index):
            try:
                item = self._load(candidate)
            except RowError as error:
                if self.strict:
                    raise
                bad.append(self._record(candidate, error))
                continue
            item.update(index=index, used_index=candidate, bad=bad)
            item["events"].update({"replaced": 1} if bad else {})
            return item
        reasons = "\n".join(f"  {r['where']} (id {r['id']!r}): {r['reason']}" for r in bad[:5])
        raise DataError(
            f"row {index} and {len(bad) - 1} replacements cannot be used. The first of them:\n{reasons}\n"
            "Repair the data; `vlmamba data check` lists every problem."
        )

    def sample(self, index: int) -> Sample:
        """The row as read, with `image_position` applied; no picture is opened."""
        sample = self.mixture[index]
        messages = place_images(sample.messages, self.image_position)
        return replace(sample, messages=messages)

    def fit(self, sample: Sample) -> Fitted:
        """Tokens and labels within `max_length` (the rules are in the class's docstring).

        Raises:
            RowError: Not even one supervised token fits.
        """
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

    def problem(self, index: int) -> dict[str, Any] | None:
        """Why a row cannot be used, pictures aside, as a record for `BadSamples.add`; None when it can."""
        try:
            self.fit(self.sample(index))
        except RowError as error:
            return self._record(index, error)
        return None

    def load_images(
        self, sample: Sample, images: Sequence[ImageRef], events: list[str]
    ) -> torch.Tensor | None:
        """Open and preprocess pictures: (n, C, S, S), or None for none.

        Raises:
            RowError: One of them cannot be opened.
        """
        if not images:
            return None
        try:
            opened = [
                open_image(ref, max_pixels=self.max_pixels, exif_transpose=self.exif_transpose, events=events)
                for ref in images
            ]
        except ImageError as error:
            raise RowError(str(error), sample.where, sample.id, "image") from error
        return torch.as_tensor(self.processor.image_processor(opened)["pixel_values"])

    def _load(self, index: int) -> Item:
        sample = self.sample(index)
        fitted = self.fit(sample)
        events = [*sample.events, *fitted.events]
        pixels = self.load_images(sample, fitted.images, events)
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

    def _candidates(self, index: int) -> Iterator[int]:
        """The row asked for, then its replacements."""
        yield index
        if self._order is not None and self._place is not None and self._place[index] >= 0:
            place = int(self._place[index])
            low, high = (
                (0, self._text_rows) if place < self._text_rows else (self._text_rows, len(self._order))
            )
            shorter, longer = range(place - 1, low - 1, -1), range(place + 1, high)
            for _, other in zip(range(MAX_ATTEMPTS - 1), chain(shorter, longer), strict=False):
                yield int(self._order[other])
            return
        generator = np.random.default_rng((self.seed, 2, index))
        for _ in range(MAX_ATTEMPTS - 1):
            yield int(generator.integers(len(self)))

    def _record(self, index: int, error: RowError) -> dict[str, Any]:
        return {
            "index": index,
            "id": error.id,
            "where": error.where,
            "kind": error.kind,
            "reason": error.reason,
        }

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


def _first_label(labels: Sequence[int]) -> int:
    return next((i for i, label in enumerate(labels) if label != IGNORE), len(labels))


def _last_label(labels: Sequence[int]) -> int:
    return next((i for i in range(len(labels) - 1, -1, -1) if labels[i] != IGNORE), -1)


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
