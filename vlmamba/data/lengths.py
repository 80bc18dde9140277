"""The exact length of every row, computed once and kept in a file, so that plans know them ahead."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vlmamba.common.progress import progress_bar
from vlmamba.data.cache import cache_name, keep_array, load_array
from vlmamba.data.dataset import VLDataset
from vlmamba.data.sources import source_fingerprint
from vlmamba.data.types import RowError

_VERSION = 1
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

    def summary(self) -> dict[str, Any]:
        """Counts and means for logs and dry runs."""
        usable = self.values[self.status == USABLE]
        return {
            "rows": len(self),
            "usable": len(usable),
            "bad": int((self.status == BAD).sum()),
            "too_long": int((self.status == TOO_LONG).sum()),
            "with_images": int((usable[:, 1] > 0).sum()),
            "tokens": int(usable[:, 0].sum()),
            "supervised": int(usable[:, 2].sum()),
            "longest": int(usable[:, 0].max(initial=0)),
        }


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
    path = _cache_path(dataset, cache_dir, processor_fingerprint)
    kept = None if path is None else load_array(path, columns=4)
    if kept is not None and len(kept) == len(dataset):
        return LengthTable(kept)
    chunks: Iterable[np.ndarray] = DataLoader(
        _Chunks(dataset),
        batch_size=None,
        num_workers=num_workers,
        generator=torch.Generator(),  # its own: else dropout would depend on whether the rows had been measured
    )
    values = np.zeros((len(dataset), 4), dtype=np.int32)
    with progress_bar(len(dataset), "measuring rows", "row", enabled=progress) as bar:
        begin = 0
        for chunk in chunks:
            values[begin : begin + len(chunk)] = chunk
            begin += len(chunk)
            bar.update(len(chunk))
    if path is not None:
        keep_array(path, values)
    return LengthTable(values)


def _measure(dataset: VLDataset, index: int) -> tuple[int, int, int, int]:
    try:
        fitted = dataset.fit(dataset.sample(index))
    except RowError as error:
        return 0, 0, 0, TOO_LONG if error.kind == "too_long" else BAD
    return len(fitted.input_ids), len(fitted.images), fitted.num_supervised, USABLE


class _Chunks(Dataset[np.ndarray]):
    def __init__(self, dataset: VLDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return -(-len(self.dataset) // _CHUNK)

    def __getitem__(self, chunk: int) -> np.ndarray:
        rows = range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(self.dataset)))
        return np.array([_measure(self.dataset, row) for row in rows], dtype=np.int32)


def _cache_path(dataset: VLDataset, cache_dir: Path | None, processor: str | None) -> Path | None:
    prints = [source_fingerprint(source) for source in dataset.mixture.sources]
    if cache_dir is None or processor is None or None in prints:
        return None
    key = [
        _VERSION,
        prints,
        processor,
        dataset.max_length,
        dataset.image_position,
        dataset.processor.num_image_tokens,
    ]
    return Path(cache_dir) / cache_name("lengths", *key)
