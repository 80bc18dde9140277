"""The plan of an epoch: which rows make which optimizer step, and which micro-batches a step is made of.

A plan is a pure function of (seed, epoch, rows, lengths, settings). The rows of step s do not depend on the
number of ranks or on the micro-batch size, so a run goes on exactly where it stopped, on another number of
ranks too; only then are the rows of a step divided into micro-batches of similar length, equally many for
every rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlmamba.errors import ConfigError

Grouping = Literal["random", "length", "modality_length"]
MEGA_STEPS = 50
"""Rows are sorted by length within windows of so many steps, so that epochs differ and stay nearly random."""


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """How an epoch is divided.

    Attributes:
        step_samples: Rows of an optimizer step (the global batch), or None.
        step_tokens: Instead: the most tokens of an optimizer step, padding not counted.
        micro_samples: The most rows of a micro-batch, or None.
        micro_tokens: Instead, or as well: the most tokens of a micro-batch, padding counted (rows x longest
            row).
        grouping: "random"; "length": the rows of a step are similarly long; "modality_length": and all
            with images or all without (but for the one step that takes what is left over).
        drop_last: Leave out the rows that do not fill a last step. Otherwise the last step is smaller.
        seed: Of the shuffling.
    """

    step_samples: int | None = None
    step_tokens: int | None = None
    micro_samples: int | None = None
    micro_tokens: int | None = None
    grouping: Grouping = "random"
    drop_last: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.step_samples is None) == (self.step_tokens is None):
            raise ConfigError(
                "give either step_samples or step_tokens (the size of an optimizer step), not both"
            )
        if self.micro_samples is None and self.micro_tokens is None:
            raise ConfigError("give micro_samples, micro_tokens or both (the size of a micro-batch)")
        if self.grouping not in ("random", "length", "modality_length"):
            raise ConfigError(f"grouping is {self.grouping!r}; it is 'random', 'length' or 'modality_length'")
        for name in ("step_samples", "step_tokens", "micro_samples", "micro_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")

    @property
    def needs_lengths(self) -> bool:
        """Whether a plan can only be made when the lengths of rows are known."""
        return self.step_tokens is not None or self.micro_tokens is not None or self.grouping != "random"


@dataclass(frozen=True)
class EpochPlan:
    """The optimizer steps of an epoch.

    Attributes:
        rows: All rows, step after step, longest first within a step.
        bounds: Step s is ``rows[bounds[s]:bounds[s + 1]]``.
        lengths: Length of each data set row (ones when unknown).
        settings: What it was made with.
        num_dropped: Rows that `drop_last` left out.
    """

    rows: np.ndarray
    bounds: np.ndarray
    lengths: np.ndarray
    settings: PlanSettings
    num_dropped: int

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def fingerprint(self) -> str:
        """Equal for equal steps, whatever the ranks and micro-batches."""
        digest = hashlib.sha256(self.rows.tobytes())
        digest.update(self.bounds.tobytes())
        return digest.hexdigest()[:16]

    def step_rows(self, step: int) -> np.ndarray:
        """The rows of a step."""
        return self.rows[self.bounds[step] : self.bounds[step + 1]]

    def step(self, step: int, *, rank: int = 0, world_size: int = 1) -> list[list[int]]:
        """The micro-batches of a step for one rank: equally many for all, of similar size at each place.

        A negative number is a filler, for a rank without work: row ``row_of(number)``, of which no
        token is supervised; so the loss of a step is the same on any number of ranks.
        """
        micros = _divide(self.step_rows(step), self.lengths, self.settings, world_size)
        return micros[rank::world_size]

    def steps(self, start: int = 0, *, rank: int = 0, world_size: int = 1) -> Iterator[list[list[int]]]:
        """The steps from `start` on."""
        for step in range(start, len(self)):
            yield self.step(step, rank=rank, world_size=world_size)

    def padding(self, *, world_size: int = 1) -> float:
        """The share of padding in all micro-batches."""
        padded = real = 0
        for step in range(len(self)):
            for micro in _divide(self.step_rows(step), self.lengths, self.settings, world_size):
                sizes = self.lengths[[row_of(number) for number in micro]]
                padded += int(sizes.max()) * len(micro)
                real += int(sum(size for size, number in zip(sizes, micro, strict=True) if number >= 0))
        return 1.0 - real / padded if padded else 0.0


def row_of(number: int) -> int:
    """The row that a number of a micro-batch means (see `EpochPlan.step`)."""
    return number if number >= 0 else -number - 1


def plan_epoch(
    indices: np.ndarray,
    settings: PlanSettings,
    epoch: int,
    *,
    lengths: np.ndarray | None = None,
    has_image: np.ndarray | None = None,
) -> EpochPlan:
    """Make the plan of an epoch.

    Args:
        indices: The data set rows of this epoch (`Mixture.epoch_indices`), repeats allowed.
        settings: How to divide them.
        epoch: Its number; another number gives another order.
        lengths: Tokens of every data set row; rows of length 0 are left out. None: unknown, all taken as
            equal.
        has_image: Whether each data set row has an image; needed for grouping "modality_length".

    Raises:
        ConfigError: Lengths are needed and missing, or a row is longer than `micro_tokens` or `step_tokens`.
    """
    indices = np.asarray(indices, dtype=np.int64)
    if lengths is None:
        if settings.needs_lengths:
            raise ConfigError(
                "token budgets and grouping by length need the lengths of the rows; compute them first"
            )
        lengths = np.ones(int(indices.max(initial=-1)) + 1, dtype=np.int64)
    if settings.grouping == "modality_length" and has_image is None:
        raise ConfigError("grouping 'modality_length' needs to know which rows have images")
    lengths = np.asarray(lengths, dtype=np.int64)
    indices = indices[lengths[indices] > 0]
    _check_budget(indices, lengths, settings)
    generator = np.random.default_rng((settings.seed, epoch))
    shuffled = generator.permutation(indices)
    whole, rest = _group(shuffled, lengths, has_image, settings)
    order = generator.permutation(len(whole))
    steps = [whole[i] for i in order]
    steps += [] if settings.drop_last else rest
    dropped = len(indices) - sum(len(step) for step in steps)
    steps = [step[np.argsort(-lengths[step], kind="stable")] for step in steps]
    if steps:  # out of memory shows in the first step, not after hours
        worst = max(
            range(len(steps)), key=lambda s: (int(lengths[steps[s][0]]), int(lengths[steps[s]].sum()))
        )
        steps.insert(0, steps.pop(worst))
    bounds = np.cumsum([0, *(len(step) for step in steps)]).astype(np.int64)
    rows = np.concatenate(steps) if steps else np.empty(0, dtype=np.int64)
    return EpochPlan(rows, bounds, lengths, settings, dropped)


def _check_budget(indices: np.ndarray, lengths: np.ndarray, settings: PlanSettings) -> None:
    longest = int(lengths[indices].max(initial=0))
    for name in ("micro_tokens", "step_tokens"):
        budget = getattr(settings, name)
        if budget is not None and longest > budget:
            raise ConfigError(
                f"the longest row has {longest} tokens but {name} is {budget}; raise it, or lower max_length"
            )


def _group(
    shuffled: np.ndarray, lengths: np.ndarray, has_image: np.ndarray | None, settings: PlanSettings
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Full steps, and the smaller step (or none) that takes what is left over."""
    if settings.grouping == "random":
        return _cut(shuffled, lengths, settings)
    if settings.grouping == "modality_length" and has_image is not None:
        flags = has_image[shuffled]
        groups = [shuffled[flags], shuffled[~flags]]
    else:
        groups = [shuffled]
    whole: list[np.ndarray] = []
    left: list[np.ndarray] = []
    for group in groups:
        windows, rest = _cut(group, lengths, settings, MEGA_STEPS)
        for window in [*windows, *rest]:
            ordered = window[np.argsort(-lengths[window], kind="stable")]
            full, over = _cut(ordered, lengths, settings)
            whole += full
            left += over
    if not left:
        return whole, []
    more, rest = _cut(np.concatenate(left), lengths, settings)
    return whole + more, rest


def _cut(
    rows: np.ndarray, lengths: np.ndarray, settings: PlanSettings, factor: int = 1
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Consecutive pieces of `factor` steps, and the last incomplete one apart."""
    if not len(rows):
        return [], []
    if settings.step_samples is not None:
        size = settings.step_samples * factor
        pieces = [rows[i : i + size] for i in range(0, len(rows), size)]
        return (pieces, []) if len(pieces[-1]) == size else (pieces[:-1], pieces[-1:])
    assert settings.step_tokens is not None
    limit = settings.step_tokens * factor
    bounds, total = [0], 0
    for i, length in enumerate(lengths[rows].tolist()):
        if total + length > limit:
            bounds.append(i)
            total = 0
        total += length
    pieces = [rows[a:b] for a, b in zip(bounds, [*bounds[1:], len(rows)], strict=True)]
    return pieces[:-1], pieces[-1:]


def _divide(
    rows: np.ndarray, lengths: np.ndarray, settings: PlanSettings, world_size: int
) -> list[list[int]]:
    """Micro-batches of a step (rows sorted longest first), their number a multiple of the ranks."""
    most = settings.micro_samples or len(rows)
    if settings.micro_tokens is None:
        count = -(-len(rows) // (most * world_size)) * world_size
        micros = [part for part in np.array_split(rows, count) if len(part)]
    else:
        micros = _within_budget(rows, lengths, most, settings.micro_tokens)
    while len(micros) % world_size:
        sizes = [len(micro) * int(lengths[micro[0]]) if len(micro) > 1 else 0 for micro in micros]
        widest = int(np.argmax(sizes))
        if not sizes[widest]:
            break
        half = (len(micros[widest]) + 1) // 2
        micros[widest : widest + 1] = [micros[widest][:half], micros[widest][half:]]
    fillers = [[-int(rows[-1]) - 1]] * (-len(micros) % world_size)
    return [micro.tolist() for micro in micros] + fillers


def _within_budget(rows: np.ndarray, lengths: np.ndarray, most: int, budget: int) -> list[np.ndarray]:
    """Consecutive pieces of at most `most` rows and `budget` padded tokens."""
    sizes = lengths[rows].tolist()
    bounds = [0]
    for i in range(1, len(rows)):
        if (i + 1 - bounds[-1]) * sizes[bounds[-1]] > budget or i - bounds[-1] >= most:
            bounds.append(i)
    return [rows[a:b] for a, b in zip(bounds, [*bounds[1:], len(rows)], strict=True)]
