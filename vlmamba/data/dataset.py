"""From rows of sources to tensors, bad rows replaced.

L tokens of a sample, n images, C channels, S image side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from vlmamba.data.conversation import ImagePosition
from vlmamba.data.encode import SampleEncoder
from vlmamba.data.mixture import Mixture, as_mixture
from vlmamba.data.pixels import PixelBuffer
from vlmamba.data.types import Item, Processor, RowError, Sample, Source
from vlmamba.errors import DataError

MAX_ATTEMPTS = 32


class VLDataset(SampleEncoder, Dataset[Item]):
    """Sources as a map-style data set of tensors.

    A row that cannot be used (wrong shape, missing or corrupt picture, no label left) is replaced by another
    one, chosen by a fixed rule, and reported in the item; `vlmamba.data.ledger.BadSamples` keeps the account
    in the main process. With `strict` it raises at once.

    Args:
        sources: One source, several, or a `Mixture`.
        processor, max_length, image_position: See `SampleEncoder`.
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
        strict: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(processor, max_length=max_length, image_position=image_position)
        self.mixture = as_mixture(sources, seed=seed)
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
        """See `item`."""
        return self.item(index)

    def item(self, index: int, buffer: PixelBuffer | None = None) -> Item:
        """One sample.

        Args:
            index: Its row.
            buffer: Where to put its pictures.

        Returns:
            What `SampleEncoder.encode` does, and ``index`` (as asked), ``used_index`` (differs when replaced),
            ``bad`` (records of the rows that were skipped, for `BadSamples.add`).

        Raises:
            RowError: The row is bad and the data set is strict.
            DataError: The row and `MAX_ATTEMPTS` replacements are bad.
        """
        bad: list[dict[str, Any]] = []
        for candidate in self._candidates(index):
            try:
                item = self.encode(self.mixture[candidate], buffer)
            except RowError as error:
                if self.strict:
                    raise
                bad.append(bad_record(candidate, error))
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
        return self.place(self.mixture[index])

    def problem(self, index: int) -> dict[str, Any] | None:
        """Why a row cannot be used, pictures aside, as a record for `BadSamples.add`; None when it can."""
        try:
            self.fit(self.sample(index))
        except RowError as error:
            return bad_record(index, error)
        return None

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


def bad_record(index: int, error: RowError) -> dict[str, Any]:
    """A row that cannot be used, for `BadSamples.add`."""
    return {
        "index": index,
        "id": error.id,
        "where": error.where,
        "kind": error.kind,
        "reason": error.reason,
    }
