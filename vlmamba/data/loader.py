"""Optimizer steps as they come to the training loop: planned, loaded by workers, accounted, resumable."""

from __future__ import annotations

import gc
import os
import signal
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vlmamba.common.vocabulary import IGNORE_INDEX
from vlmamba.data.collate import collate
from vlmamba.data.dataset import VLDataset
from vlmamba.data.ledger import BadSamples
from vlmamba.data.pixels import PixelBuffer
from vlmamba.data.sampler import EpochPlan, PlanSettings, plan_epoch, row_of
from vlmamba.data.types import Batch, Item
from vlmamba.errors import ConfigError, DataError, VLMambaError

if TYPE_CHECKING:
    from vlmamba.data.lengths import LengthTable

_FAILURE = "_failure"
_ENDED = ("killed by signal", "exited unexpectedly", "timed out")
"""How torch says that a worker gives nothing any more."""


@dataclass(frozen=True)
class Step:
    """One optimizer step of this rank.

    Attributes:
        epoch: Number of the epoch.
        index: Number of the step within the epoch.
        micro_batches: Batches of `vlmamba.data.collate.collate`.
        num_samples, num_supervised, num_tokens, num_padding: Sums over the micro-batches; `num_supervised` is
            what the loss is divided by (after summing over ranks).
        events: What happened to rows, name -> count.
    """

    epoch: int
    index: int
    micro_batches: list[Batch]
    num_samples: int = field(init=False)
    num_supervised: int = field(init=False)
    num_tokens: int = field(init=False)
    num_padding: int = field(init=False)
    events: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_supervised", "num_tokens", "num_padding"):
            object.__setattr__(self, name, sum(batch[name] for batch in self.micro_batches))
        events: Counter[str] = Counter()
        for batch in self.micro_batches:
            events.update(batch["events"])
        object.__setattr__(self, "events", dict(events))


class StepLoader(ABC):
    """Iterates over the optimizer steps of one epoch, from the current position to the end of the epoch.

    ``for step in loader`` goes on where the loader stands; after the last step the position is the start of the next
    epoch. `state_dict`, taken while a step is being worked on, counts that step as done. Epoch and position count
    optimizer steps, which are the same on any number of ranks. No global random state is used: neither workers nor
    their number change what comes.

    Attributes:
        epoch, position: Where it stands.
        bad_samples: The account of bad rows.
    """

    differs = ("", "")
    """What has changed since a checkpoint was made, and what to leave as it was, for that message."""

    def __init__(self, bad_samples: BadSamples) -> None:
        self.bad_samples = bad_samples
        self.epoch = self.position = 0
        self._loader: DataLoader[Batch] | None = None

    @property
    def num_rows(self) -> int | None:
        """Rows of the data, None when not known."""
        return None

    @abstractmethod
    def __len__(self) -> int:
        """Steps of the current epoch, done ones included."""

    @abstractmethod
    def fingerprint_of(self, epoch: int) -> str:
        """Equal for equal rows in equal steps."""

    @abstractmethod
    def _workers(self) -> DataLoader[Batch]:
        """What gives the micro-batches from the current position on."""

    @abstractmethod
    def _count(self, step: int) -> int:
        """Micro-batches of this rank in a step."""

    def __iter__(self) -> Iterator[Step]:
        """The steps that are left of the current epoch.

        Raises:
            DataError: The budget of bad rows is used up, a row and all its replacements are bad, or a shard cannot be
                read.
        """
        epoch, steps = self.epoch, len(self)
        self._loader = self._workers()
        batches = iter(self._loader)
        for index in range(self.position, steps):
            try:
                micro_batches = [received(batches, self.bad_samples) for _ in range(self._count(index))]
            except VLMambaError:
                self.close()
                raise
            self.position = index + 1
            yield Step(epoch, index, micro_batches)
        self.epoch, self.position = epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, and the account of bad rows."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "plan": self.fingerprint_of(self.epoch),
            "bad_samples": self.bad_samples.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, on any number of ranks that can share the steps.

        Raises:
            DataError: Rows, lengths, seed or the size of a step are not those of the state.
        """
        plan = self.fingerprint_of(int(state["epoch"]))
        if plan != state["plan"]:
            raise DataError(
                f"{self.differs[0]} not what the checkpoint was made with: the plan of epoch {state['epoch']} is "
                f"{plan} and was {state['plan']}. Use the same {self.differs[1]}; to train on other data, start from "
                "the model's weights instead of resuming."
            )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self.bad_samples.load_state_dict(state["bad_samples"])

    def close(self) -> None:
        """Stop the workers (they start again with the next iteration)."""
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None and self._loader is not None:
            iterator._shutdown_workers()
            self._loader._iterator = None


def data_loader(
    dataset: Dataset[Batch], *, seed: int, num_workers: int = 0, prefetch_factor: int = 4, **options: Any
) -> DataLoader[Batch]:
    """Torch's `DataLoader` of a data set of whole micro-batches, which its prefetch factor counts."""
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        persistent_workers=num_workers > 0,
        collate_fn=as_is,
        worker_init_fn=set_up_worker,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


class Loader(StepLoader):
    """The steps of a data set, planned ahead.

    Args:
        dataset: The data set.
        settings: How epochs are divided.
        lengths: Lengths of the rows; needed for token budgets and grouping. Their bad rows are left out and
            entered in the account at once.
        bad_samples: The account of bad rows (default: a new one with the default budget).
        rank, world_size: Which share of each step this process loads.
        workers: See `data_loader`.
    """

    differs = "the data is", "annotation files, weights, max_length, seed, grouping and step size"

    def __init__(
        self,
        dataset: VLDataset,
        settings: PlanSettings,
        *,
        lengths: LengthTable | None = None,
        bad_samples: BadSamples | None = None,
        rank: int = 0,
        world_size: int = 1,
        **workers: Any,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} of {world_size} ranks")
        super().__init__(bad_samples if bad_samples is not None else BadSamples(len(dataset)))
        self.dataset, self.settings, self.lengths = dataset, settings, lengths
        self.rank, self.world_size = rank, world_size
        self._plan: tuple[int, EpochPlan] | None = None
        if lengths is not None:
            dataset.use_lengths(lengths.lengths, lengths.num_images)
            self.bad_samples.add(lengths.problems(dataset))
        self._indices = _MicroBatchIndices(rank, world_size)
        batches = _MicroBatches(dataset, settings)
        self._loader = data_loader(batches, seed=settings.seed, sampler=self._indices, **workers)

    @property
    def plan(self) -> EpochPlan:
        """The plan of the current epoch."""
        return self.plan_of(self.epoch)

    def plan_of(self, epoch: int) -> EpochPlan:
        """The plan of any epoch (the last one asked for is kept).

        Raises:
            DataError: Not one step can be made of the rows.
        """
        if self._plan is None or self._plan[0] != epoch:
            table = self.lengths
            plan = plan_epoch(
                self.dataset.mixture.epoch_indices(epoch),
                self.settings,
                epoch,
                lengths=None if table is None else table.lengths,
                num_images=None if table is None else table.num_images,
            )
            if not len(plan):
                raise DataError(
                    f"no step can be made: none of the {len(self.dataset)} rows can be used. `vlmamba data check` "
                    "says why."
                )
            self._plan = (epoch, plan)
        return self._plan[1]

    @property
    def num_rows(self) -> int:
        """Rows of the data set."""
        return len(self.dataset)

    def __len__(self) -> int:
        """Steps of the current epoch, done ones included."""
        return len(self.plan)

    def fingerprint_of(self, epoch: int) -> str:
        """See `EpochPlan.fingerprint`."""
        return self.plan_of(epoch).fingerprint

    def _workers(self) -> DataLoader[Batch]:
        self._indices.plan, self._indices.start = self.plan, self.position
        assert self._loader is not None
        return self._loader

    def _count(self, step: int) -> int:
        return len(self.plan.step(step, rank=self.rank, world_size=self.world_size))


def received(batches: Iterator[Batch], account: BadSamples) -> Batch:
    """The next micro-batch from the workers, its bad rows entered in the account.

    Raises:
        DataError: A worker met an error that it could not pass over, was killed, or gave nothing in time.
    """
    with killed_is_data_error():
        batch = next(batches)
    if _FAILURE in batch:
        raise batch[_FAILURE]
    account.add(batch["bad_samples"])
    return batch


@contextmanager
def killed_is_data_error() -> Iterator[None]:
    """Say what it means when torch says that a worker process gives nothing any more.

    Raises:
        DataError: It was killed, or gave nothing in time.
    """
    try:
        yield
    except (
        RuntimeError,
        ConnectionError,
        EOFError,
    ) as error:  # the last two: it died while handing tensors over
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in _ENDED):
            raise
        raise DataError(
            f"a process that loads data ended without a word ({error}). It was killed, mostly for want of memory "
            "(see dmesg) or of shared memory (/dev/shm): lower data.num_workers (--workers of vlmamba data), or raise "
            "the job's memory. A run loses the steps since its last checkpoint and no more; continue with --resume."
        ) from error


def build_loader(
    dataset: VLDataset,
    settings: PlanSettings,
    *,
    lengths: LengthTable | None = None,
    max_bad_fraction: float = 0.001,
    bad_samples_path: Path | None = None,
    **options: Any,
) -> Loader:
    """A `Loader` with an account of bad rows.

    Args:
        dataset: The data set.
        settings: How epochs are divided.
        lengths: Lengths of its rows (`vlmamba.data.lengths.compute_lengths`).
        max_bad_fraction: Budget of bad rows, see `BadSamples`.
        bad_samples_path: Where they are listed, or None.
        options: All else that `Loader` takes.
    """
    account = BadSamples(len(dataset), max_bad_fraction, bad_samples_path)
    return Loader(dataset, settings, lengths=lengths, bad_samples=account, **options)


class _MicroBatchIndices(Sampler[list[int]]):
    """The row numbers of each micro-batch of a plan from a step on.

    It must not refer to the loader: in a reference cycle, worker processes take seconds to stop.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.plan: EpochPlan | None = None
        self.start = 0

    def __iter__(self) -> Iterator[list[int]]:
        assert self.plan is not None
        for step in self.plan.steps(self.start, rank=self.rank, world_size=self.world_size):
            yield from step


class _MicroBatches(Dataset[Batch]):
    """Row numbers to a collated batch, inside a worker. Users' errors come back as values, unwrapped."""

    def __init__(self, dataset: VLDataset, settings: PlanSettings) -> None:
        self.dataset = dataset
        self.multiple, self.packed = settings.pad_to_multiple_of, settings.pack_tokens is not None

    def __getitem__(self, indices: list[int]) -> Batch:
        buffer = PixelBuffer(expected=len(indices))
        try:
            items = [self._item(index, buffer) for index in indices]
        except VLMambaError as error:
            error.__cause__ = error.__context__ = None
            return {_FAILURE: error}
        pad = self.dataset.processor.pad_token_id
        return collate(items, pad, pad_to_multiple_of=self.multiple, packed=self.packed, buffer=buffer)

    def _item(self, index: int, buffer: PixelBuffer) -> Item:
        item = self.dataset.item(row_of(index), buffer)
        if index < 0:
            item["labels"] = torch.full_like(item["labels"], IGNORE_INDEX)
            item["filler"] = True
        return item


def set_up_worker(number: int) -> None:
    """One process, one core: the tokenizer starts no threads, and what the parent made is never garbage."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()
    leave_signals_to_the_parent(number)


def leave_signals_to_the_parent(_: int) -> None:
    """Let a worker outlive a signal to the whole process group, as schedulers send it.

    The main process saves and then ends its workers. One that cannot be reached otherwise ends two minutes later.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(120))


def as_is(batch: Any) -> Any:
    """No collation: micro-batches come whole."""
    return batch
