"""The exact length of every row, computed once and kept in a file, so that plans know them ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vlmamba.common.progress import progress_bar
from vlmamba.data.cache import kept_table
from vlmamba.data.dataset import VLDataset
from vlmamba.data.loader import as_is, killed_is_data_error
from vlmamba.data.types import RowError

T = TypeVar("T")

_VERSION = 2
_CHUNK = 256
USABLE, BAD, TOO_LONG = 0, 1, 2


@dataclass(frozen=True)
class LengthTable:
    """One line a row: ``values[:, 0]`` tokens (0 if unusable), 1 images, 2 supervised tokens, 3 status.

    Tokens and images are those after cutting to the maximum length, image tokens included.
    """

    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return self.values[:, 0]

    @property
    def num_images(self) -> np.ndarray:
        """Images of each row."""
        return self.values[:, 1]

    @property
    def num_supervised(self) -> np.ndarray:
        """Supervised tokens of each row."""
        return self.values[:, 2]

    @property
    def status(self) -> np.ndarray:
        """`USABLE`, `BAD` or `TOO_LONG` for each row."""
        return self.values[:, 3]

    def problems(self, dataset: VLDataset, limit: int = 100_000) -> list[dict[str, Any]]:
        """Records of the unusable rows for `BadSamples.add`; they are read again to say why."""
        rows = np.flatnonzero(self.status != USABLE)[:limit]
        return [record for row in rows if (record := dataset.problem(int(row))) is not None]


def compute_lengths(
    dataset: VLDataset,
    *,
    cache_dir: Path | None = None,
    processor_fingerprint: str | None = None,
    num_workers: int = 0,
    progress: bool = True,
) -> LengthTable:
    """Tokenise every row (pictures are not opened) or read the result of an earlier run.

    Args:
        dataset: The data set.
        cache_dir: Where results are kept, or None. Nothing is cached when a source has no fingerprint.
        processor_fingerprint: Changes when tokenizer or chat template change; without it nothing is cached.
        num_workers: Processes to use.
        progress: Show a progress bar.

    Returns:
        A table in the order of the data set.
    """

    def find() -> np.ndarray:
        work = partial(_measure, dataset)
        chunks = in_chunks(
            work,
            len(dataset),
            size=_CHUNK,
            num_workers=num_workers,
            title="measuring rows",
            progress=progress,
        )
        return np.concatenate([np.empty((0, 4), dtype=np.int32), *chunks])

    prints = [getattr(source, "fingerprint", None) for source in dataset.mixture.sources]
    if cache_dir is None or processor_fingerprint is None or None in prints:
        return LengthTable(find())
    key = (
        _VERSION,
        prints,
        processor_fingerprint,
        dataset.max_length,
        dataset.image_position,
        dataset.processor.num_image_tokens,
    )
    return LengthTable(kept_table("lengths", key, find, columns=4, folder=Path(cache_dir), mapped=False))


def _measure(dataset: VLDataset, rows: range) -> np.ndarray:
    """(rows, 4): see `LengthTable`."""
    found = []
    for row in rows:
        try:
            fitted = dataset.fit(dataset.sample(row))
            found.append((len(fitted.input_ids), len(fitted.images), fitted.num_supervised, USABLE))
        except RowError as error:
            found.append((0, 0, 0, TOO_LONG if error.kind == "too_long" else BAD))
    return np.array(found, dtype=np.int32)


class _Chunks(Dataset[T]):
    """What is made of consecutive rows."""

    def __init__(self, work: Callable[[range], T], count: int, size: int) -> None:
        self.work, self.count, self.size = work, count, size

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def __getitem__(self, chunk: int) -> T:
        return self.work(range(chunk * self.size, min((chunk + 1) * self.size, self.count)))


def in_chunks(
    work: Callable[[range], T], count: int, *, size: int, num_workers: int, title: str, progress: bool
) -> Iterator[T]:
    """Results for consecutive rows, in order, made by several processes.

    Args:
        work: Makes a result of some rows.
        count: All rows.
        size: Rows at a time.
        num_workers: Processes; 0 does it in this one.
        title: Of the bar.
        progress: Show a bar, unless VLMAMBA_PROGRESS is 0.

    Raises:
        DataError: A process was killed.
    """
    chunks = DataLoader(
        _Chunks(work, count, size),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=as_is,
        generator=torch.Generator(),  # its own: else dropout would depend on whether the rows had been measured
    )
    with progress_bar(count, title, "row", enabled=progress) as bar, killed_is_data_error():
        for number, result in enumerate(chunks):
            yield result
            bar.update(min(size, count - number * size))
