"""Plans of epochs: laws that hold for every setting."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from vlmamba.data import Mixture, PlanSettings, plan_epoch
from vlmamba.data.sampler import row_of
from vlmamba.errors import ConfigError

ROWS = 203
RNG = np.random.default_rng(0)
LENGTHS = np.clip(RNG.lognormal(4.0, 0.8, ROWS), 5, 500).astype(np.int64)
IMAGES = RNG.random(ROWS) < 0.7
INDICES = np.arange(ROWS)

SETTINGS = [
    PlanSettings(grouping=grouping, **step, **micro)  # type: ignore[arg-type]
    for grouping, step, micro in product(
        ("random", "length", "modality_length"),
        ({"step_samples": 16}, {"step_tokens": 2000}),
        ({"micro_samples": 4}, {"micro_tokens": 700}, {"micro_samples": 3, "micro_tokens": 900}),
    )
]


def make(settings: PlanSettings, epoch: int = 0, indices: np.ndarray = INDICES):
    return plan_epoch(indices, settings, epoch, lengths=LENGTHS, num_images=IMAGES)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_row_exactly_once_within_the_limits(settings: PlanSettings) -> None:
    plan = make(settings)
    assert sorted(row for step in plan.steps() for micro in step for row in micro) == INDICES.tolist()
    for index, step in enumerate(plan.steps()):
        rows = [row for micro in step for row in micro]
        assert rows == plan.step_rows(index).tolist()
        for micro in step:
            assert len(micro) <= (settings.micro_samples or ROWS)
            assert len(micro) * LENGTHS[micro].max() <= (settings.micro_tokens or 10**9)
        if settings.step_samples is not None and index and index < len(plan) - 1:
            assert len(rows) == settings.step_samples
        if settings.step_tokens is not None:
            assert LENGTHS[rows].sum() <= settings.step_tokens


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_share_the_same_steps_equally(settings: PlanSettings, world_size: int) -> None:
    plan = make(settings)
    for index in range(len(plan)):
        ranks = [plan.step(index, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert len({len(micros) for micros in ranks}) == 1
        real = sorted(row for micros in ranks for micro in micros for row in micro if row >= 0)
        assert real == sorted(plan.step_rows(index).tolist())
        fillers = [row for micros in ranks for micro in micros for row in micro if row < 0]
        assert all(row_of(row) in real for row in fillers)
        assert len(fillers) < world_size


def test_fillers_appear_only_when_rows_run_out() -> None:
    plan = plan_epoch(np.arange(3), PlanSettings(step_samples=8, micro_samples=4), 0)
    pairs = [plan.step(0, rank=rank, world_size=2) for rank in range(2)]
    assert sorted(row for (micro,) in pairs for row in micro) == [0, 1, 2]
    micros = [plan.step(0, rank=rank, world_size=4) for rank in range(4)]
    assert all(len(m) == 1 and len(m[0]) == 1 for m in micros)
    assert micros[3][0][0] < 0
    assert sum(m[0][0] >= 0 for m in micros) == 3


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_plans_are_deterministic_and_epochs_differ(settings: PlanSettings) -> None:
    assert make(settings).fingerprint == make(settings).fingerprint
    assert make(settings, 0).fingerprint != make(settings, 1).fingerprint
    other = PlanSettings(**{**settings.__dict__, "seed": 1})
    assert make(settings).fingerprint != make(other).fingerprint


def test_steps_do_not_depend_on_the_micro_batches() -> None:
    for grouping in ("random", "length", "modality_length"):
        plans = [
            make(PlanSettings(step_samples=16, grouping=grouping, **micro))  # type: ignore[arg-type]
            for micro in ({"micro_samples": 1}, {"micro_samples": 8}, {"micro_tokens": 600})
        ]
        assert len({plan.fingerprint for plan in plans}) == 1


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_longest_row_comes_first(settings: PlanSettings) -> None:
    plan = make(settings)
    first = plan.step(0)[0]
    assert LENGTHS[first[0]] == LENGTHS.max()


def test_grouping_by_length_pads_less() -> None:
    def padding(grouping: str) -> float:
        return make(PlanSettings(step_samples=16, micro_samples=16, grouping=grouping)).padding()  # type: ignore[arg-type]

    assert padding("length") < 0.25 < 0.5 < padding("random")
    assert padding("modality_length") < 0.35


def test_modalities_are_not_mixed_but_for_one_step() -> None:
    plan = make(PlanSettings(step_samples=8, micro_samples=4, grouping="modality_length"))
    mixed = [i for i in range(len(plan)) if len(set(IMAGES[plan.step_rows(i)])) == 2]
    assert len(mixed) <= 2
    assert {bool(IMAGES[plan.step_rows(i)][0]) for i in range(len(plan))} == {True, False}


def test_the_last_step_is_smaller() -> None:
    settings = PlanSettings(step_samples=16, micro_samples=4)
    assert ROWS % 16 and len(make(settings)) == ROWS // 16 + 1
    assert len(plan_epoch(np.arange(32), settings, 0)) == 2


def test_unusable_rows_are_left_out() -> None:
    lengths = LENGTHS.copy()
    lengths[[3, 100]] = 0
    plan = plan_epoch(INDICES, PlanSettings(step_samples=16, micro_samples=4), 0, lengths=lengths)
    assert sorted(plan.rows.tolist()) == [i for i in range(ROWS) if i not in (3, 100)]


def test_repeated_rows_stay_repeated() -> None:
    plan = plan_epoch(np.array([0, 0, 1, 1, 2, 2]), PlanSettings(step_samples=4, micro_samples=2), 0)
    assert sorted(plan.rows.tolist()) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_samples": 1}, "give either step_samples or step_tokens"),
        (
            {"step_samples": 1, "step_tokens": 1, "micro_samples": 1},
            "give either step_samples or step_tokens",
        ),
        ({"step_samples": 1}, "give micro_samples, micro_tokens or both"),
        ({"step_samples": 0, "micro_samples": 1}, "step_samples is 0; it must be at least 1"),
        (
            {"step_samples": 1, "micro_samples": 1, "grouping": "len"},
            "grouping is 'len'; it is 'random', 'length' or",
        ),
    ],
)
def test_wrong_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PlanSettings(**options)  # type: ignore[arg-type]


def test_what_a_plan_needs() -> None:
    with pytest.raises(ConfigError, match="need the lengths of the rows"):
        plan_epoch(INDICES, PlanSettings(step_samples=8, micro_tokens=600), 0)
    with pytest.raises(ConfigError, match="needs to know which rows have images"):
        settings = PlanSettings(step_samples=8, micro_samples=2, grouping="modality_length")
        plan_epoch(INDICES, settings, 0, lengths=LENGTHS)
    with pytest.raises(
        ConfigError, match=f"the longest row has {LENGTHS.max()} tokens but micro_tokens is 20"
    ):
        make(PlanSettings(step_samples=8, micro_tokens=20))


class Numbers:
    """A source of nothing but its size."""

    def __init__(self, size: int, name: str = "n") -> None:
        self.size, self.name = size, name

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row: int) -> tuple[str, int]:
        return self.name, row


def test_mixture_is_one_index_space() -> None:
    mixture = Mixture([Numbers(3, "a"), Numbers(0, "z"), Numbers(2, "b")])
    assert [mixture[i] for i in range(len(mixture))] == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]
    with pytest.raises(IndexError):
        mixture[5]


def test_mixture_weights_are_epochs_of_a_source() -> None:
    mixture = Mixture([Numbers(10), Numbers(100), Numbers(7)], [2, 0.25, 1])
    for epoch in range(3):
        indices = mixture.epoch_indices(epoch)
        assert np.bincount(indices, minlength=117)[:10].tolist() == [2] * 10
        assert ((indices >= 10) & (indices < 110)).sum() == 25
        assert np.bincount(indices, minlength=117)[110:].tolist() == [1] * 7
        assert (indices == mixture.epoch_indices(epoch)).all()


def test_mixture_fractions_see_every_row_in_turn() -> None:
    mixture = Mixture([Numbers(100)], [0.25], seed=3)
    epochs = [set(mixture.epoch_indices(e).tolist()) for e in range(8)]
    assert set.union(*epochs[:4]) == set.union(*epochs[4:]) == set(range(100))
    assert epochs[0] != epochs[4], "the second pass is shuffled anew"
    assert set(Mixture([Numbers(100)], [0.25], seed=4).epoch_indices(0).tolist()) != epochs[0]
    counts = np.bincount(Mixture([Numbers(10)], [1.5]).epoch_indices(0), minlength=10)
    assert counts.sum() == 15
    assert counts.min() == 1


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1], "1 weights for 2 sources; give one weight each"),
        ([1, 0], "the weight of source 'n' is 0.0; weights are positive numbers"),
        ([1, float("nan")], "the weight of source 'n' is nan"),
    ],
)
def test_wrong_weights(weights: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mixture([Numbers(3), Numbers(3)], weights)
    with pytest.raises(ConfigError, match="needs at least one source"):
        Mixture([])
