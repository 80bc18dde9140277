"""Sources that can only be read from beginning to end, as optimizer steps that can be resumed on other ranks.

The shards of a source are dealt to V lanes; a lane reads its shards one after another, pass after pass in a new
order, and mixes rows within blocks. Every optimizer step takes k rows of every lane, so a lane that has given s * k
rows stands at the same place whoever reads it: ranks and workers only share out the lanes, and the state of a run is
one number of steps. V depends on the size of a step, of a micro-batch and on the number of shards alone.

Lengths are not known ahead, so steps are not packed and rows are not grouped by length beyond a lane's share of a
step. A row that cannot be used is left out and entered in the account.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vlmamba.common.vocabulary import IGNORE_INDEX
from vlmamba.data.collate import collate
from vlmamba.data.dataset import bad_record
from vlmamba.data.encode import SampleEncoder
from vlmamba.data.ledger import BadSamples
from vlmamba.data.loader import StepLoader, data_loader
from vlmamba.data.types import Batch, Item, RowError, Sample, Stream
from vlmamba.errors import ConfigError, DataError, VLMambaError

GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, without their whole part, fill [0, 1) evenly at any number of them."""


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """How streams are divided.

    Attributes:
        step_samples: Rows of an optimizer step, a multiple of `micro_samples`.
        micro_samples: Rows of a micro-batch.
        steps: Optimizer steps of the run.
        shuffle_block: Rows of a lane are mixed within blocks of so many.
        seed: Of the order.
    """

    step_samples: int
    micro_samples: int
    steps: int
    shuffle_block: int = 64
    seed: int = 0


def number_of_lanes(streams: Sequence[Stream], settings: StreamSettings, world_size: int = 1) -> int:
    """As many lanes as a step has micro-batches, or the largest divisor of that for which there are shards.

    Raises:
        ConfigError: The ranks cannot share the lanes equally.
    """
    most = settings.step_samples // settings.micro_samples
    fewest = min(streams, key=lambda stream: stream.num_shards)
    lanes = max(n for n in range(1, most + 1) if most % n == 0 and n <= max(fewest.num_shards, 1))
    if lanes % world_size:
        raise ConfigError(
            f"{most} micro-batches a step and {fewest.num_shards} shards of {fewest.name!r} make {lanes} lanes of "
            f"data, which {world_size} ranks cannot share equally. Write the data in more shards (at least as many "
            "as ranks, better several times as many), or choose a global batch that is a multiple of "
            "micro-batch x ranks."
        )
    return lanes


class Lane:
    """The endless sequence of rows of one lane.

    Args:
        streams: The sources.
        weights: The share of rows each has in the mixture, in proportion.
        lane, lanes: Which lane of how many.
        settings: See `StreamSettings`.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        weights: Sequence[float],
        lane: int,
        lanes: int,
        settings: StreamSettings,
    ) -> None:
        self.streams, self.lane, self.lanes, self.settings = list(streams), lane, lanes, settings
        self.bounds = np.cumsum(weights) / np.sum(weights)

    def rows(self, start: int) -> Iterator[Sample | RowError]:
        """Rows from number `start` on."""
        size = self.settings.shuffle_block
        first = start // size
        plain = self._in_order(first * size)
        for block in count(first):
            rows = [next(plain) for _ in range(size)]
            order = np.random.default_rng((self.settings.seed, self.lane, block)).permutation(size)
            for place in order[start - block * size if block == first else 0 :]:
                yield rows[place]

    def _in_order(self, start: int) -> Iterator[Sample | RowError]:
        """Rows of all sources by their weights, not mixed further."""
        given = np.bincount(self._sources(np.arange(start)), minlength=len(self.streams))
        readers = [self._one(which, int(number)) for which, number in enumerate(given)]
        for number in count(start):
            yield next(readers[int(self._sources(np.array([number]))[0])])

    def _sources(self, numbers: np.ndarray) -> np.ndarray:
        """Which source the rows of these numbers come from: a sequence of low discrepancy."""
        places = ((numbers + self.lane + 1) * GOLDEN) % 1.0
        return np.minimum(np.searchsorted(self.bounds, places, side="right"), len(self.streams) - 1)

    def _one(self, which: int, start: int) -> Iterator[Sample | RowError]:
        """This lane's rows of one source from number `start` on, over passes without end."""
        stream, left = self.streams[which], start
        for number in count():
            order = np.random.default_rng((self.settings.seed, which, number)).permutation(stream.num_shards)
            found = False
            for shard in order[self.lane :: self.lanes].tolist():
                skipped = 0
                if left:
                    skipped = min(left, stream.count(shard))
                    left -= skipped
                    found = found or skipped > 0
                if not left:
                    for row in stream.read(shard, skipped):
                        found = True
                        yield row
            if not found:
                raise DataError(
                    f"the shards of {stream.name!r} hold no rows (lane {self.lane} of {self.lanes})"
                )


class StreamLoader(StepLoader):
    """The steps of streams; those of the run count as one epoch.

    Args:
        streams: The sources.
        encoder: Makes tensors of samples.
        settings: How streams are divided.
        weights: The share of rows each source has (default: equal).
        bad_samples: The account of rows that cannot be used.
        rank, world_size: Which share of each step this process loads.
        num_workers: At most so many processes share the rank's lanes; no more are started than can share them equally.
        workers: See `vlmamba.data.loader.data_loader`.
    """

    differs = "the streams are", "sources with the same shards, weights, seed, global batch and micro-batch"

    def __init__(
        self,
        streams: Sequence[Stream],
        encoder: SampleEncoder,
        settings: StreamSettings,
        *,
        weights: Sequence[float] | None = None,
        bad_samples: BadSamples | None = None,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        **workers: Any,
    ) -> None:
        self.streams, self.encoder, self.settings = list(streams), encoder, settings
        self.weights = [1.0] * len(self.streams) if weights is None else list(weights)
        self.lanes = number_of_lanes(streams, settings, world_size)
        total = settings.steps * settings.step_samples
        super().__init__(bad_samples if bad_samples is not None else BadSamples(total))
        self.mine = range(rank, self.lanes, world_size)
        self.num_workers = max((n for n in range(1, num_workers + 1) if len(self.mine) % n == 0), default=0)
        self.workers = workers

    def __len__(self) -> int:
        """Steps of the run."""
        return self.settings.steps

    def fingerprint_of(self, epoch: int) -> str:
        """Equal for equal rows in equal steps."""
        sources = [(s.name, s.num_shards, w) for s, w in zip(self.streams, self.weights, strict=True)]
        sizes = (self.settings.step_samples, self.settings.shuffle_block, self.settings.seed)
        return hashlib.sha256(repr((sources, sizes, self.lanes)).encode()).hexdigest()[:16]

    def _workers(self) -> DataLoader[Batch]:
        batches = _LaneBatches(self, self.mine, self.position)
        return data_loader(batches, seed=self.settings.seed, num_workers=self.num_workers, **self.workers)

    def _count(self, step: int) -> int:
        share = self.settings.step_samples // self.lanes
        return len(self.mine) * -(-share // self.settings.micro_samples)


class _LaneBatches(IterableDataset[Batch]):
    """The micro-batches of some lanes, step after step; workers share out the lanes.

    The order over all workers, taken in turn, is that of one process: piece by piece, lane by lane.
    """

    def __init__(self, loader: StreamLoader, lanes: Sequence[int], start: int) -> None:
        self.encoder, self.settings, self.start = loader.encoder, loader.settings, start
        self.lanes, self.total = list(lanes), loader.lanes
        self.share = loader.settings.step_samples // loader.lanes
        self.pieces = -(-self.share // loader.settings.micro_samples)
        self._readers = {
            lane: Lane(loader.streams, loader.weights, lane, loader.lanes, loader.settings)
            for lane in self.lanes
        }

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        lanes = self.lanes if worker is None else self.lanes[worker.id :: worker.num_workers]
        rows = {lane: self._readers[lane].rows(self.start * self.share) for lane in lanes}
        try:
            for step in count(self.start):
                steps = {
                    lane: self._cut([next(rows[lane]) for _ in range(self.share)], lane, step)
                    for lane in lanes
                }
                for piece in range(self.pieces):
                    for lane in lanes:
                        yield steps[lane][piece]
        except VLMambaError as error:
            error.__cause__ = error.__context__ = None
            yield {"_failure": error}

    def _cut(self, rows: list[Sample | RowError], lane: int, step: int) -> list[Batch]:
        """A lane's share of a step as micro-batches of similar length, equally many whatever was unusable."""
        items: list[Item] = []
        bad: list[dict[str, Any]] = []
        for place, row in enumerate(rows):
            try:
                if isinstance(row, RowError):
                    raise row
                items.append(self.encoder.encode(row))
            except RowError as error:
                number = (step * self.total + lane) * self.share + place
                bad.append(bad_record(number, error))
        items.sort(key=lambda item: -len(item["input_ids"]))
        pad = self.encoder.processor.pad_token_id
        bounds = np.linspace(0, len(items), self.pieces + 1).round().astype(int)
        batches = [collate(items[a:b] or [_nothing(pad)], pad) for a, b in pairwise(bounds)]
        batches[0]["bad_samples"] += bad
        return batches


def _nothing(pad: int) -> Item:
    """Stands where every row was unusable: runs through the model and teaches nothing."""
    ids = torch.full((2,), pad, dtype=torch.long)
    return {
        "input_ids": ids,
        "labels": torch.full_like(ids, IGNORE_INDEX),
        "pixel_values": None,
        "id": None,
        "filler": True,
    }
