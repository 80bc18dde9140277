"""Several sources as one, each with a weight: how many times its rows are seen in an epoch of the mixture."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from vlmamba.data.sources import read_row
from vlmamba.data.types import Sample, Source
from vlmamba.errors import ConfigError


class Mixture:
    """Sources one after another in one index space, and which of the indices belong to an epoch.

    A weight of 1 is every row once an epoch, 2 every row twice, 0.25 a quarter of the rows; the next epoch
    goes on where the last one stopped, so that four epochs of weight 0.25 see every row once.

    Args:
        sources: The sources.
        weights: One positive number each (default: all 1).
        seed: Decides which rows a fractional weight takes.

    Raises:
        ConfigError: No source, another number of weights, or a weight that is not positive.
    """

    def __init__(
        self, sources: Sequence[Source], weights: Sequence[float] | None = None, *, seed: int = 0
    ) -> None:
        self.sources = list(sources)
        self.weights = [1.0] * len(self.sources) if weights is None else [float(w) for w in weights]
        self.seed = seed
        if not self.sources:
            raise ConfigError("a mixture needs at least one source")
        if len(self.weights) != len(self.sources):
            raise ConfigError(
                f"{len(self.weights)} weights for {len(self.sources)} sources; give one weight each"
            )
        for source, weight in zip(self.sources, self.weights, strict=True):
            if not (weight > 0 and np.isfinite(weight)):
                raise ConfigError(
                    f"the weight of source {source.name!r} is {weight}; weights are positive numbers"
                )
        sizes = [len(source) for source in self.sources]
        self.offsets = [0, *np.cumsum(sizes).tolist()]

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def locate(self, index: int) -> tuple[Source, int]:
        """The source and row of a global index."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a mixture of {len(self)} rows")
        which = bisect_right(self.offsets, index) - 1
        return self.sources[which], index - self.offsets[which]

    def __getitem__(self, index: int) -> Sample:
        return read_row(*self.locate(index))

    def epoch_indices(self, epoch: int) -> np.ndarray:
        """The global indices of an epoch, with repeats, not shuffled (the plan does that): int64."""
        parts = [self._epoch_rows(i, epoch) + self.offsets[i] for i in range(len(self.sources))]
        return np.concatenate(parts).astype(np.int64)

    def _epoch_rows(self, which: int, epoch: int) -> np.ndarray:
        """A window of the endless sequence "all rows shuffled, all rows shuffled anew, ..." of a source."""
        rows = self.offsets[which + 1] - self.offsets[which]
        if rows == 0:
            return np.empty(0, dtype=np.int64)
        count = max(1, round(self.weights[which] * rows))
        begin, end = epoch * count, (epoch + 1) * count
        passes = [
            np.random.default_rng((self.seed, which, number)).permutation(rows)
            for number in range(begin // rows, (end - 1) // rows + 1)
        ]
        first = begin // rows * rows
        return np.sort(np.concatenate(passes)[begin - first : end - first])


def as_mixture(sources: Mixture | Source | Sequence[Source], *, seed: int = 0) -> Mixture:
    """A mixture as it is; a source or several with weight 1."""
    if isinstance(sources, Mixture):
        return sources
    return Mixture(list(sources) if isinstance(sources, list | tuple) else [sources], seed=seed)  # type: ignore[list-item]
