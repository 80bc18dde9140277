"""What the parts of the data pipeline hand to one another: samples, sources, the processor, row errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from vlmamba.common.vocabulary import ImageRef, Message
from vlmamba.errors import DataError, ImageError, VLMambaError


@dataclass(frozen=True)
class Sample:
    """One row of a source, read but not yet tokenised; images are named, not decoded.

    Attributes:
        id: The row's own id, opaque (str or int; None when the row has none).
        messages: The turns; image parts stand where their pictures belong, in the order of `images`.
        images: One reference for each image part.
        source: Name of the source.
        row: Index within the source.
        where: File and row or line, for messages.
        events: What was repaired while reading, one name an event (see `vlmamba.data.conversation`).
    """

    id: str | int | None
    messages: list[Message]
    images: tuple[ImageRef, ...]
    source: str
    row: int
    where: str = ""
    events: tuple[str, ...] = ()


@runtime_checkable
class Source(Protocol):
    """Random access to rows. A new kind of storage is one class with these three members.

    A source may also have ``fingerprint: str``, which changes when its rows change; only then are the lengths
    of its rows cached (see `vlmamba.data.lengths`). `__getitem__` raises `RowError` for a row that cannot be
    used.
    """

    @property
    def name(self) -> str:
        """A short name for logs."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Sample: ...


class Stream(Protocol):
    """Shards of rows, each read from beginning to end."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def num_shards(self) -> int: ...  # noqa: D102

    def read(self, shard: int, start: int = 0) -> Iterator[Sample | RowError]:
        """The rows of a shard from row `start` on, always the same; unusable ones as their error."""
        ...

    def count(self, shard: int) -> int:
        """The rows of a shard."""
        ...


class Encoded(Protocol):
    """A tokenised conversation: ids (an image is a run of image tokens), labels (-100 = not supervised)."""

    @property
    def input_ids(self) -> Sequence[int]: ...  # noqa: D102

    @property
    def labels(self) -> Sequence[int]: ...  # noqa: D102

    @property
    def num_images(self) -> int: ...  # noqa: D102


class Processor(Protocol):
    """The part of `vlmamba.models.VLMambaProcessor` that data needs."""

    @property
    def num_image_tokens(self) -> int: ...  # noqa: D102

    @property
    def pad_token_id(self) -> int: ...  # noqa: D102

    @property
    def image_token_id(self) -> int: ...  # noqa: D102

    @property
    def image_processor(self) -> Any:
        """``image_processor(images) -> {"pixel_values": (n, C, S, S)}``.

        One that also has ``output_shape`` (C, S, S) and ``process_one(image, out)`` writes into the batch itself.
        """
        ...

    def encode_messages(self, messages: list[Message], *, add_generation_prompt: bool = False) -> Encoded:
        """Ids and labels of a conversation."""
        ...


class RowError(DataError):
    """A row that cannot be used, with its place and id.

    Args:
        reason: What is wrong and what to do.
        where: File and row or line.
        id: The row's id.
        kind: A short name for counters: "shape", "image", "image_count", "token_without_image", "too_long", "no_label",
            "video", "template", "error".
    """

    def __init__(
        self,
        reason: str,
        where: str = "",
        id: str | int | None = None,  # noqa: A002
        kind: str = "shape",
    ) -> None:
        self.reason, self.where, self.id, self.kind = reason, where, id, kind
        place = f"{where} (id {id!r})" if id is not None else where
        super().__init__(f"{place}: {reason}" if place else reason)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.where, self.id, self.kind)


@contextmanager
def row_errors(where: str, row_id: str | int | None = None, kind: str = "shape") -> Iterator[None]:
    """Whatever goes wrong with a row becomes its `RowError`.

    Wrong settings, missing packages and files, and want of memory are nobody's row: they stay what they are.

    Args:
        where: File and row or line, for errors that do not know it.
        row_id: The row's id, likewise.
        kind: Of a `DataError`; others are of kind "image" or "error".

    Raises:
        RowError: The block raised something.
    """
    try:
        yield
    except RowError as error:
        if error.where:
            raise
        raise RowError(error.reason, where, row_id, error.kind) from error.__cause__
    except ImageError as error:
        raise RowError(str(error), where, row_id, "image") from error
    except DataError as error:
        raise RowError(str(error), where, row_id, kind) from error
    except (VLMambaError, MemoryError, AssertionError):
        raise
    except Exception as error:  # of a source, a template or a tokenizer that is the user's own
        raise RowError(f"{type(error).__name__}: {error}", where, row_id, "error") from error


EVENTS = (
    "image_without_token",
    "token_without_image",
    "escaped_literal_image",
    "leading_gpt_dropped",
    "trailing_human_dropped",
    "consecutive_turns_merged",
    "empty_answer",
    "invalid_unicode",
    "image_suffix_replaced",
    "image_of_one_colour",
    "truncated",
    "turns_dropped",
    "replaced",
)
"""Every repair that is counted: while reading a row (`vlmamba.data.conversation`), opening its pictures, fitting it
to the maximum length, and standing in for a row that cannot be used."""

Item = dict[str, Any]
"""One element of a dataset: see `vlmamba.data.dataset.VLDataset.__getitem__`."""

Batch = dict[str, Any]
"""One micro-batch: see `vlmamba.data.collate.collate`."""


def as_long(values: Sequence[int]) -> torch.Tensor:
    """A 1-D int64 tensor."""
    return torch.from_numpy(np.array(values, dtype=np.int64))
