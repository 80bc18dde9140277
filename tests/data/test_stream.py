"""Streams: lanes, steps that do not depend on ranks and workers, resuming, mixtures, bad rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import pytest
import torch

from tests.data.conftest import FakeProcessor, chat
from vlmamba.data import BadSamples, RowError, Sample, Step
from vlmamba.data.encode import SampleEncoder
from vlmamba.data.sources import sample_of
from vlmamba.data.stream import Lane, StreamLoader, StreamSettings, number_of_lanes
from vlmamba.errors import ConfigError, DataError

SETTINGS = StreamSettings(step_samples=16, micro_samples=4, steps=12, shuffle_block=8, seed=3)


class Numbers:
    """A stream of rows ``name/shard/row``."""

    def __init__(self, shards: int = 6, rows: int = 9, name: str = "n", bad: tuple[int, ...] = ()) -> None:
        self.num_shards, self.rows, self.name, self.bad = shards, rows, name, bad
        self.reads = 0

    def read(self, shard: int, start: int = 0) -> Iterator[Sample | RowError]:
        for row in range(start, self.count(shard)):
            self.reads += 1
            where = f"{self.name}/{shard}/{row}"
            if row in self.bad:
                yield RowError("broken", where)
                continue
            content = {"id": where, "conversations": chat("q" * (1 + row % 3), "a" * (1 + shard))}
            yield sample_of(content, [], source=self.name, number=row, where=where, orphan_tokens="reject")

    def count(self, shard: int) -> int:
        return self.rows + shard % 2


def ids(steps: list[Step]) -> list[list[str]]:
    return [sorted(name for b in step.micro_batches for name in b["ids"] if name) for step in steps]


def make(*streams: Numbers, settings: StreamSettings = SETTINGS, **options: Any) -> StreamLoader:
    encoder = SampleEncoder(FakeProcessor(), max_length=64)
    return StreamLoader(streams or (Numbers(),), encoder, settings, **options)


def test_every_row_comes_and_none_of_a_shard_twice_in_a_pass() -> None:
    stream = Numbers(6, 8)
    lanes = [Lane([stream], [1], lane, 3, SETTINGS) for lane in range(3)]
    first = [row.where for lane in lanes for row in islice(lane._in_order(0), 16)]
    assert len(set(first)) == len(first) == 48, "two shards of at least 8 rows a lane, all different"
    assert len({row.where for lane in lanes for row in islice(lane._in_order(0), 200)}) == 51


@pytest.mark.parametrize("start", [0, 1, 7, 8, 30, 61, 200])
def test_a_lane_starts_anywhere(start: int) -> None:
    lane = Lane([Numbers(), Numbers(5, 4, "m")], [2, 1], 1, 2, SETTINGS)
    whole = [row.where for row in islice(lane.rows(0), start + 20)]
    assert [row.where for row in islice(lane.rows(start), 20)] == whole[start:]
    assert whole != [row.where for row in islice(lane._in_order(0), start + 20)]


def test_starting_late_reads_little() -> None:
    stream = Numbers(6, 100)
    next(Lane([stream], [1], 0, 2, SETTINGS).rows(10_000))
    assert stream.reads <= 100 + SETTINGS.shuffle_block


def test_weights_are_shares_of_the_rows() -> None:
    lane = Lane([Numbers(name="a"), Numbers(name="b")], [3, 1], 0, 2, SETTINGS)
    names = Counter(row.where[0] for row in islice(lane.rows(0), 400))
    assert abs(names["b"] - 100) <= 3


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (1, 2), (2, 0), (4, 0), (2, 1)])
def test_ranks_and_workers_change_nothing(world_size: int, num_workers: int) -> None:
    whole = list(make())
    shares = [
        list(make(rank=rank, world_size=world_size, num_workers=num_workers)) for rank in range(world_size)
    ]
    assert [len(step.micro_batches) for step in whole] == [4] * 12
    for steps in zip(whole, *shares, strict=True):
        alone, *parts = steps
        assert sorted(chain.from_iterable(ids([part])[0] for part in parts)) == ids([alone])[0]
        assert {len(part.micro_batches) for part in parts} == {4 // world_size}
        assert sum(part.num_supervised for part in parts) == alone.num_supervised
    if world_size == 1:
        for one, other in zip(whole, shares[0], strict=True):
            for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
                assert torch.equal(a["input_ids"], b["input_ids"])


def test_small_micro_batches_keep_the_order_over_workers() -> None:
    settings = StreamSettings(step_samples=16, micro_samples=2, steps=5, seed=3)
    alone = list(make(Numbers(4), settings=settings))
    workers = list(make(Numbers(4), settings=settings, num_workers=2))
    assert len(alone[0].micro_batches) == 8
    assert [[b["ids"] for b in s.micro_batches] for s in alone] == [
        [b["ids"] for b in s.micro_batches] for s in workers
    ]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 1), (2, 4)])
def test_a_stream_goes_on_with_another_number_of_ranks(before: int, after: int) -> None:
    whole = ids(list(make()))
    first = make(rank=before - 1, world_size=before)
    steps = iter(first)
    for _ in range(5):
        next(steps)
    state = json.loads(json.dumps(first.state_dict()))
    shares = []
    for rank in range(after):
        loader = make(rank=rank, world_size=after)
        loader.load_state_dict(state)
        shares.append(ids(list(loader)))
    assert [sorted(chain.from_iterable(parts)) for parts in zip(*shares, strict=True)] == whole[5:]


def test_other_streams_are_noticed() -> None:
    state = make().state_dict()
    for other in (make(Numbers(7)), make(Numbers(), Numbers(name="m")), make(weights=[2.0])):
        with pytest.raises(DataError, match="the streams are not what the checkpoint was made with"):
            other.load_state_dict(state)


def test_bad_rows_are_left_out_and_listed() -> None:
    loader = make(Numbers(6, 9, bad=(2,)), bad_samples=BadSamples(192, max_bad_fraction=0.2))
    steps = list(loader)
    missing = sum(16 - step.num_samples for step in steps)
    assert missing == loader.bad_samples.count > 10
    assert {r["reason"] for r in loader.bad_samples.records.values()} == {"broken"}
    assert {len(step.micro_batches) for step in steps} == {4}


def test_a_share_without_a_usable_row_teaches_nothing() -> None:
    account = BadSamples(1000, max_bad_fraction=1.0)
    loader = make(Numbers(6, 9, bad=tuple(range(10))), bad_samples=account)
    step = next(iter(loader))
    assert step.num_samples == step.num_supervised == 0
    assert all(batch["input_ids"].shape == (1, 2) for batch in step.micro_batches)


def test_shards_must_do_for_the_ranks() -> None:
    assert number_of_lanes([Numbers(6)], SETTINGS) == 4
    assert number_of_lanes([Numbers(3)], SETTINGS) == 2
    with pytest.raises(
        ConfigError, match=r"3 shards of 'n' make 2 lanes of data, which 4 ranks cannot share"
    ):
        make(Numbers(3), rank=0, world_size=4)
    with pytest.raises(DataError, match=r"the shards of 'n' hold no rows"):
        list(make(Numbers(6, 0)))


def test_errors_of_workers_arrive_as_they_are() -> None:
    class Cut(Numbers):
        def read(self, shard: int, start: int = 0) -> Iterator[Sample | RowError]:
            yield from islice(super().read(shard, start), 3)
            raise DataError("the shard x.tar cannot be read: unexpected end. Get it again.")

    with pytest.raises(DataError, match=r"^the shard x\.tar cannot be read"):
        list(make(Cut(), num_workers=2))
