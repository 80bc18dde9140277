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

from vlmamba.data.packing import pack, pack_into
from vlmamba.errors import ConfigError

Grouping = Literal["random", "length", "modality_length"]
MEGA_STEPS = 50
"""Rows are sorted by length within windows of so many steps, so that epochs differ and stay nearly random."""


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """How an epoch is divided.

    Attributes:
        step_samples: Rows of an optimizer step (the global batch), or None.
        step_tokens: Instead: the most tokens of an optimizer step, padding not counted. With `pack_tokens`, of
            which it is a multiple, every step is packed into step_tokens / pack_tokens rows.
        micro_samples: The most rows of a micro-batch, or None.
        micro_tokens: Instead, or as well: the most tokens of a micro-batch, padding counted (rows x longest
            row).
        pack_tokens: Instead of both: samples are packed one after another into rows of at most so many tokens
            (`vlmamba.data.packing`); a micro-batch is one such row.
        pad_to_multiple_of: The length of every micro-batch is rounded up to a multiple of it.
        grouping: "random"; "length": the rows of a step are similarly long; "modality_length": and all
            with images or all without (but for the one step that takes what is left over).
        seed: Of the shuffling.
    """

    step_samples: int | None = None
    step_tokens: int | None = None
    micro_samples: int | None = None
    micro_tokens: int | None = None
    pack_tokens: int | None = None
    pad_to_multiple_of: int = 1
    grouping: Grouping = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.step_samples is None) == (self.step_tokens is None):
            raise ConfigError(
                "give either step_samples or step_tokens (the size of an optimizer step), not both"
            )
        sized = self.micro_samples is not None or self.micro_tokens is not None
        if sized == (self.pack_tokens is not None):
            raise ConfigError(
                "give micro_samples, micro_tokens or both (the size of a padded micro-batch), or else "
                "pack_tokens (the length of a packed row)"
            )
        if self.grouping not in ("random", "length", "modality_length"):
            raise ConfigError(f"grouping is {self.grouping!r}; it is 'random', 'length' or 'modality_length'")
        for name in (
            "step_samples",
            "step_tokens",
            "micro_samples",
            "micro_tokens",
            "pack_tokens",
            "pad_to_multiple_of",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if self.step_tokens is not None and self.pack_tokens and self.step_tokens % self.pack_tokens:
            raise ConfigError(
                f"step_tokens {self.step_tokens} is not a multiple of pack_tokens {self.pack_tokens}"
            )

    @property
    def step_rows(self) -> int | None:
        """Packed rows of every step, where steps are so many tokens."""
        if self.step_tokens is None or self.pack_tokens is None:
            return None
        return self.step_tokens // self.pack_tokens

    @property
    def needs_lengths(self) -> bool:
        """Whether a plan can only be made when the lengths of rows are known."""
        budgets = (self.step_tokens, self.micro_tokens, self.pack_tokens)
        return any(budget is not None for budget in budgets) or self.grouping != "random"


@dataclass(frozen=True)
class EpochPlan:
    """The optimizer steps of an epoch.

    Attributes:
        rows: All rows, step after step, longest first within a step.
        bounds: Step s is ``rows[bounds[s]:bounds[s + 1]]``.
        lengths: Length of each data set row (ones when unknown).
        num_images: Images of each data set row (zeros when unknown).
        settings: What it was made with.
    """

    rows: np.ndarray
    bounds: np.ndarray
    lengths: np.ndarray
    num_images: np.ndarray
    settings: PlanSettings

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
        return self.micro_batches(step, world_size)[rank::world_size]

    def micro_batches(self, step: int, world_size: int = 1) -> list[list[int]]:
        """The micro-batches of a step for all ranks: rank r has numbers r, r + world_size, ..."""
        rows = self.step_rows(step)
        if self.settings.pack_tokens is None:
            return _divide(rows, self.lengths, self.settings, world_size)
        lengths, images, budget = self.lengths[rows], self.num_images[rows], self.settings.pack_tokens
        count = self.settings.step_rows
        if count is not None and count % world_size:
            raise ConfigError(f"a step of {count} packed rows cannot be shared among {world_size} processes")
        packed = None if count is None else pack_into(lengths, images, budget, count)
        packed = packed or pack(lengths, images, budget, ranks=world_size)
        filler = -int(rows[-1]) - 1
        return [rows[row].tolist() if row else [filler] for row in packed]

    def steps(self, start: int = 0, *, rank: int = 0, world_size: int = 1) -> Iterator[list[list[int]]]:
        """The steps from `start` on."""
        for step in range(start, len(self)):
            yield self.step(step, rank=rank, world_size=world_size)

    def padding(self, *, world_size: int = 1) -> float:
        """The share of padding in all micro-batches."""
        return self.account(world_size=world_size).padding

    def account(self, *, world_size: int = 1, steps: int | None = None) -> PlanAccount:
        """What the plan costs.

        Args:
            world_size: The number of ranks.
            steps: Look at so many steps only, evenly spread.
        """
        chosen = np.arange(len(self))
        if steps is not None and steps < len(self):
            chosen = np.linspace(0, len(self) - 1, steps).astype(int)
        account = PlanAccount()
        for step in chosen.tolist():
            micros = self.micro_batches(step, world_size)
            for start in range(0, len(micros), world_size):
                account.add([self._size(micro) for micro in micros[start : start + world_size]])
        return account

    def _size(self, micro: list[int]) -> tuple[int, int, int]:
        """Real tokens, positions with padding, and images of a micro-batch."""
        sizes = self.lengths[[row_of(number) for number in micro]]
        multiple = self.settings.pad_to_multiple_of
        packed = self.settings.pack_tokens is not None
        width = -(-int(sizes.sum() if packed else sizes.max()) // multiple) * multiple
        real = [number for number in micro if number >= 0]
        return (
            int(self.lengths[real].sum()),
            width * (1 if packed else len(micro)),
            int(self.num_images[real].sum()),
        )


@dataclass
class PlanAccount:
    """What a plan costs, in positions.

    Attributes:
        micro_batches: Micro-batches of all ranks.
        tokens: Real tokens.
        positions: Tokens and padding.
        slots: Positions if every rank had those of the fullest one at each micro-step: what the ranks wait for.
        images: Images.
        image_slots: Images if every rank had those of the rank with the most at each micro-step.
    """

    micro_batches: int = 0
    tokens: int = 0
    positions: int = 0
    slots: int = 0
    images: int = 0
    image_slots: int = 0

    def add(self, ranks: list[tuple[int, int, int]]) -> None:
        """Count one micro-step: tokens, positions and images of each rank."""
        self.micro_batches += len(ranks)
        self.tokens += sum(tokens for tokens, _, _ in ranks)
        self.positions += sum(positions for _, positions, _ in ranks)
        self.slots += max(positions for _, positions, _ in ranks) * len(ranks)
        self.images += sum(images for _, _, images in ranks)
        self.image_slots += max(images for _, _, images in ranks) * len(ranks)

    @property
    def padding(self) -> float:
        """Share of padding among all positions."""
        return 1.0 - self.tokens / self.positions if self.positions else 0.0

    @property
    def idle(self) -> float:
        """Share of the ranks' time that is lost to padding and to waiting for the fullest rank."""
        return 1.0 - self.tokens / self.slots if self.slots else 0.0

    @property
    def image_idle(self) -> float:
        """The same of the encoder's work."""
        return 1.0 - self.images / self.image_slots if self.image_slots else 0.0


def row_of(number: int) -> int:
    """The row that a number of a micro-batch means (see `EpochPlan.step`)."""
    return number if number >= 0 else -number - 1


def plan_epoch(
    indices: np.ndarray,
    settings: PlanSettings,
    epoch: int,
    *,
    lengths: np.ndarray | None = None,
    num_images: np.ndarray | None = None,
) -> EpochPlan:
    """Make the plan of an epoch.

    Args:
        indices: The data set rows of this epoch (`Mixture.epoch_indices`), repeats allowed.
        settings: How to divide them.
        epoch: Its number; another number gives another order.
        lengths: Tokens of every data set row; rows of length 0 are left out. None: unknown, all taken as
            equal.
        num_images: Images of every data set row; needed for grouping "modality_length", and to balance packed
            rows.

    Raises:
        ConfigError: Lengths are needed and missing, or a row is longer than `micro_tokens`, `pack_tokens` or
            `step_tokens`.
    """
    indices = np.asarray(indices, dtype=np.int64)
    if lengths is None:
        if settings.needs_lengths:
            raise ConfigError(
                "token budgets and grouping by length need the lengths of the rows; compute them first"
            )
        lengths = np.ones(int(indices.max(initial=-1)) + 1, dtype=np.int64)
    if settings.grouping == "modality_length" and num_images is None:
        raise ConfigError("grouping 'modality_length' needs to know which rows have images")
    lengths = np.asarray(lengths, dtype=np.int64)
    indices = indices[lengths[indices] > 0]
    _check_budget(indices, lengths, settings)
    generator = np.random.default_rng((settings.seed, epoch))
    shuffled = generator.permutation(indices)
    images = np.zeros_like(lengths) if num_images is None else np.asarray(num_images, dtype=np.int64)
    whole, rest = _group(shuffled, lengths, images, settings)
    order = generator.permutation(len(whole))
    steps = [*(whole[i] for i in order), *rest]
    steps = [step[np.argsort(-lengths[step], kind="stable")] for step in steps]
    if steps:  # out of memory shows in the first step, not after hours
        worst = max(range(len(steps)), key=lambda s: _memory(lengths[steps[s]], settings))
        steps.insert(0, steps.pop(worst))
    bounds = np.cumsum([0, *(len(step) for step in steps)]).astype(np.int64)
    rows = np.concatenate(steps) if steps else np.empty(0, dtype=np.int64)
    return EpochPlan(rows, bounds, lengths, images, settings)


def _memory(lengths: np.ndarray, settings: PlanSettings) -> tuple[float, int]:
    """What steps are compared by for their need of memory: the longest row, then all tokens."""
    total = int(lengths.sum())
    if settings.pack_tokens is None:
        return float(lengths[0]), total
    return total / (settings.step_rows or -(-total // settings.pack_tokens)), total


def _check_budget(indices: np.ndarray, lengths: np.ndarray, settings: PlanSettings) -> None:
    longest = int(lengths[indices].max(initial=0))
    for name in ("micro_tokens", "pack_tokens", "step_tokens"):
        budget = getattr(settings, name)
        if budget is not None and longest > budget:
            raise ConfigError(
                f"the longest row has {longest} tokens but {name} is {budget}; raise it, or lower data.max_length"
            )


def _group(
    shuffled: np.ndarray, lengths: np.ndarray, images: np.ndarray, settings: PlanSettings
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Full steps, and the smaller step (or none) that takes what is left over."""
    if settings.grouping == "random":
        return _cut_steps(shuffled, lengths, images, settings)
    if settings.grouping == "modality_length":
        flags = images[shuffled] > 0
        groups = [shuffled[flags], shuffled[~flags]]
    else:
        groups = [shuffled]
    whole: list[np.ndarray] = []
    left: list[np.ndarray] = []
    for group in groups:
        windows, rest = _cut(group, lengths, settings, MEGA_STEPS)
        for window in [*windows, *rest]:
            ordered = window[np.argsort(-lengths[window], kind="stable")]
            full, over = _cut_steps(ordered, lengths, images, settings)
            whole += full
            left += over
    if not left:
        return whole, []
    more, rest = _cut_steps(np.concatenate(left), lengths, images, settings)
    return whole + more, rest


def _cut_steps(
    rows: np.ndarray, lengths: np.ndarray, images: np.ndarray, settings: PlanSettings
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Consecutive steps, and the last incomplete one apart."""
    count, budget = settings.step_rows, settings.pack_tokens
    if count is None or budget is None:
        return _cut(rows, lengths, settings)
    ends = np.cumsum(lengths[rows])
    pieces: list[np.ndarray] = []
    begin, share = 0, 1.0  # tokens of a step that its rows hold: about as many as in the step before
    while begin < len(rows):
        passed = int(ends[begin - 1]) if begin else 0
        share = min(share + 1 / 256, 1.0)
        while True:
            end = int(np.searchsorted(ends, passed + share * count * budget, side="right"))
            piece = rows[begin : max(end, begin + 1)]
            if pack_into(lengths[piece], images[piece], budget, count) is not None:
                break
            share -= 1 / 64
        pieces.append(piece)
        begin += len(piece)
    return pieces[:-1], pieces[-1:]


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
