"""Collation, resuming, workers, accounts of bad rows, kept lengths, the check of a data set."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.conftest import FakeProcessor, WriteRows, chat, many_rows
from vlmamba.data import (
    BadSamples,
    Loader,
    Mixture,
    PlanSettings,
    Step,
    VLDataset,
    build_loader,
    check,
    collate,
    compute_lengths,
    missing_folders,
)
from vlmamba.errors import ConfigError, DataError

SETTINGS = PlanSettings(step_samples=8, micro_samples=4)
GROUPED = PlanSettings(step_samples=8, micro_tokens=130, grouping="modality_length")


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def same_steps(a: list[Step], b: list[Step]) -> bool:
    return len(a) == len(b) and all(
        (x.epoch, x.index) == (y.epoch, y.index) and same(x.micro_batches, y.micro_batches)
        for x, y in zip(a, b, strict=True)
    )


def epochs(loader: Loader, count: int) -> list[Step]:
    return [step for _ in range(count) for step in loader]


def test_collate_pads_on_the_right(dataset: VLDataset) -> None:
    items = [dataset[i] for i in (0, 1, 2)]
    batch = collate(items, pad_token_id=0)
    lengths = [len(item["input_ids"]) for item in items]
    assert "attention_mask" not in batch, "a causal model needs none, see tests/models/test_packing.py"
    for row, item in enumerate(items):
        assert batch["input_ids"][row, : lengths[row]].tolist() == item["input_ids"].tolist()
        assert batch["labels"][row, : lengths[row]].tolist() == item["labels"].tolist()
        assert (batch["labels"][row, lengths[row] :] == -100).all()
        assert (batch["input_ids"][row, lengths[row] :] == 0).all()
    assert batch["pixel_values"].shape == (2, 3, 4, 4)
    assert batch["num_images"] == [0, 1, 1]
    assert batch["ids"] == ["r0", "r1", "r2"]
    assert batch["sources"] == ["rows"] * 3
    assert batch["num_samples"] == 3
    assert batch["num_tokens"] == sum(lengths)
    assert batch["num_padding"] == 3 * max(lengths) - sum(lengths)
    assert batch["num_supervised"] == (batch["labels"] != -100).sum()


def test_collate_of_text_rows_has_no_pixels(dataset: VLDataset) -> None:
    batch = collate([dataset[0], dataset[3]], 0, pad_to_multiple_of=8)
    assert "pixel_values" not in batch
    assert batch["input_ids"].shape[1] % 8 == 0


def test_a_label_on_the_first_token_cannot_be_counted() -> None:
    item = {"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([5, 6]), "pixel_values": None, "id": 1}
    assert collate([item], 0)["num_supervised"] == 1


def test_steps_account_for_their_micro_batches(dataset: VLDataset) -> None:
    loader = build_loader(dataset, SETTINGS)
    steps = list(loader)
    assert len(steps) == len(loader) == 4
    assert [step.num_samples for step in steps] == [8, 8, 8, 6]
    seen = sorted(id_ for step in steps for batch in step.micro_batches for id_ in batch["ids"])
    assert seen == sorted(f"r{i}" for i in range(30))
    assert (loader.epoch, loader.position) == (1, 0)
    for step in steps:
        assert step.num_supervised == sum(int((b["labels"][:, 1:] != -100).sum()) for b in step.micro_batches)


@pytest.mark.parametrize("settings", [SETTINGS, GROUPED])
def test_resumes_exactly_mid_epoch(dataset: VLDataset, settings: PlanSettings) -> None:
    table = compute_lengths(dataset, progress=False)
    whole = epochs(build_loader(dataset, settings, lengths=table), 3)
    per_epoch = len(whole) // 3
    for stop in (1, per_epoch - 1, per_epoch, per_epoch + 2):
        first = build_loader(dataset, settings, lengths=table)
        done: list[Step] = []
        while len(done) < stop:
            for step in first:
                done.append(step)
                if len(done) == stop:
                    break
        state = json.loads(json.dumps(first.state_dict()))
        second = build_loader(dataset, settings, lengths=table)
        second.load_state_dict(state)
        rest: list[Step] = []
        while len(done) + len(rest) < len(whole):
            rest.extend(second)
        assert same_steps(done + rest, whole)


def test_iteration_goes_on_after_a_break(dataset: VLDataset) -> None:
    whole = list(build_loader(dataset, SETTINGS))
    loader = build_loader(dataset, SETTINGS)
    first = [next(iter(loader)), next(iter(loader))]
    assert same_steps(first + list(loader), whole)


def test_other_data_is_noticed_when_resuming(
    dataset: VLDataset, write: WriteRows, processor: FakeProcessor
) -> None:
    state = build_loader(dataset, SETTINGS).state_dict()
    shorter = VLDataset(write(many_rows(29)), processor)
    with pytest.raises(DataError, match="the data is not what the checkpoint was made with"):
        build_loader(shorter, SETTINGS).load_state_dict(state)
    with pytest.raises(DataError, match="the data is not what the checkpoint was made with"):
        build_loader(dataset, PlanSettings(step_samples=8, micro_samples=4, seed=1)).load_state_dict(state)
    build_loader(dataset, PlanSettings(step_samples=8, micro_samples=2)).load_state_dict(state)


@pytest.mark.parametrize("settings", [SETTINGS, GROUPED])
def test_workers_change_nothing(
    write: WriteRows, processor: FakeProcessor, root: Path, settings: PlanSettings
) -> None:
    rows = many_rows(30)
    (root / "bad.png").write_bytes(b"\x89PNG nothing")
    rows[4]["image"] = "bad.png"
    data = VLDataset(write(rows), processor, max_length=64)
    table = compute_lengths(data, progress=False)
    alone = epochs(build_loader(data, settings, lengths=table), 2)
    loader = build_loader(data, settings, lengths=table, num_workers=2, prefetch_factor=3)
    assert same_steps(epochs(loader, 2), alone)
    assert [r["id"] for r in loader.bad_samples.records.values()] == ["r4"]


def test_a_closed_loader_can_go_on(dataset: VLDataset) -> None:
    whole = list(build_loader(dataset, SETTINGS))
    loader = build_loader(dataset, SETTINGS, num_workers=1)
    first = next(iter(loader))
    loader.close()
    loader.close()
    assert same_steps([first, *loader], whole)
    loader.close()


def test_loading_leaves_the_global_random_state_alone(dataset: VLDataset) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    epochs(build_loader(dataset, SETTINGS, num_workers=1), 1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_load_what_one_process_loads(dataset: VLDataset, world_size: int) -> None:
    table = compute_lengths(dataset, progress=False)
    for settings in (SETTINGS, GROUPED):
        alone = list(build_loader(dataset, settings, lengths=table))
        ranks = [
            list(build_loader(dataset, settings, lengths=table, rank=rank, world_size=world_size))
            for rank in range(world_size)
        ]
        for steps in zip(alone, *ranks, strict=True):
            whole, *parts = steps
            assert len({len(part.micro_batches) for part in parts}) == 1
            for name in ("num_samples", "num_supervised", "num_tokens"):
                assert getattr(whole, name) == sum(getattr(part, name) for part in parts)
    with pytest.raises(ConfigError, match="rank 2 of 2 ranks"):
        build_loader(dataset, SETTINGS, rank=2, world_size=2)


def test_fillers_have_no_label(write: WriteRows, processor: FakeProcessor) -> None:
    data = VLDataset(write(many_rows(1)), processor)
    (step,) = list(build_loader(data, SETTINGS, rank=1, world_size=2))
    assert step.num_samples == step.num_supervised == step.num_tokens == 0
    assert (step.micro_batches[0]["labels"] == -100).all()
    assert step.micro_batches[0]["input_ids"].any()


def test_no_step_at_all(write: WriteRows, processor: FakeProcessor) -> None:
    data = VLDataset(write(many_rows(3)), processor)
    lengths = compute_lengths(data, progress=False)
    lengths.lengths[:] = 0
    with pytest.raises(DataError, match="no step can be made: none of the 3 rows can be used"):
        list(build_loader(data, PlanSettings(step_samples=8, micro_samples=4), lengths=lengths))


def test_bad_rows_in_a_mixture_are_listed(write: WriteRows, processor: FakeProcessor, tmp_path: Path) -> None:
    good = write(many_rows(30), "good.json")
    lines = [{"id": i, "conversations": chat("q", "a")} for i in range(30)]
    lines[7] = {"id": 7}  # type: ignore[dict-item]
    lines[9] = {"id": 9, "conversations": chat("q" * 99, "a")}
    data = VLDataset(Mixture([good, write(lines, "lines.jsonl")], [1, 1]), processor, max_length=64)
    path = tmp_path / "run" / "bad_samples.jsonl"
    table = compute_lengths(data, progress=False)
    assert np.bincount(table.status).tolist() == [58, 1, 1]
    loader = build_loader(data, SETTINGS, lengths=table, bad_samples_path=path)
    assert sum(step.num_samples for step in loader) == 58
    listed = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["id"], r["kind"], Path(r["where"]).name) for r in listed] == [
        (7, "shape", "lines.jsonl:8"),
        (9, "too_long", "lines.jsonl:10"),
    ]
    assert listed[0]["reason"].startswith("the row has no 'conversations'")
    assert (loader.bad_samples.count, loader.bad_samples.charged) == (2, 1)
    build_loader(data, SETTINGS, lengths=table, bad_samples_path=path)
    assert len(path.read_text().splitlines()) == 2, "a resumed run does not list them again"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_hopeless_data_set_is_one_clear_error(
    write: WriteRows, processor: FakeProcessor, num_workers: int
) -> None:
    rows = [
        {"id": i, "image": f"coco/train2017/{i}.jpg", "conversations": chat("<image>q", "a")}
        for i in range(50)
    ]
    loader = build_loader(VLDataset(write(rows), processor), SETTINGS, num_workers=num_workers)
    with pytest.raises(DataError) as caught:
        list(loader)
    message = str(caught.value)
    assert "31 replacements cannot be used" in message
    assert "there is no folder" in message
    assert "http://images.cocodataset.org" in message
    assert "Traceback" not in message


def test_strict_raises_at_once(write: WriteRows, processor: FakeProcessor) -> None:
    rows = [*many_rows(10), {"id": "odd"}]
    loader = build_loader(VLDataset(write(rows), processor, strict=True), SETTINGS)
    with pytest.raises(DataError, match=r"rows\.json:row 10 \(id 'odd'\): the row has no 'conversations'"):
        list(loader)


def test_replacements_fit_where_lengths_are_known(write: WriteRows, processor: FakeProcessor) -> None:
    rows = many_rows(60)
    for i in (1, 4, 28, 31):
        rows[i]["image"] = "gone.png"
    data = VLDataset(write(rows), processor)
    table = compute_lengths(data, progress=False)
    data.use_lengths(table.lengths, table.num_images)
    for i in (1, 4, 28, 31):
        item = data[i]
        assert item["pixel_values"] is not None
        assert item["used_index"] not in (1, 4, 28, 31)
        smallest = table.lengths[(table.num_images > 0)].min()
        assert len(item["input_ids"]) <= table.lengths[i] or table.lengths[i] == smallest
    with pytest.raises(DataError, match="lengths of 3 rows for a data set of 60"):
        data.use_lengths(table.lengths[:3], table.num_images[:3])


@pytest.mark.parametrize(
    ("rows", "fraction", "allowed"),
    [(665_000, 0.001, 665), (1000, 0.001, 8), (50, 0.001, 5), (9, 0.001, 0), (1000, 0.0, 0), (100, 0.5, 50)],
)
def test_size_of_the_budget(rows: int, fraction: float, allowed: int) -> None:
    account = BadSamples(rows, fraction)
    assert account.allowed == allowed
    record = {"id": "x", "where": "f:row 1", "kind": "image", "reason": "gone"}
    account.add({**record, "index": i} for i in range(allowed))
    assert account.add([{**record, "index": 0}] * (allowed > 0)) == 0, "a row counts once"
    account.add({**record, "index": 10**6 + i, "kind": "too_long"} for i in range(100))
    with pytest.raises(
        DataError, match=rf"{allowed + 1} of {rows} rows cannot be used \({allowed + 1} image\)"
    ):
        account.add([{**record, "index": allowed}])


def test_the_account_survives_resuming() -> None:
    account = BadSamples(100, 0.01)
    account.add([{"index": 3, "id": 3, "where": "f", "kind": "image", "reason": "gone"}])
    other = BadSamples(100, 0.01)
    other.load_state_dict(pickle.loads(pickle.dumps(account.state_dict())))
    assert (other.count, other.kinds) == (1, account.kinds)


def test_lengths_are_exact_and_kept(
    write: WriteRows, processor: FakeProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(many_rows(30))
    data = VLDataset(source, processor, max_length=30)
    options: dict[str, Any] = {"cache_dir": tmp_path / "cache", "progress": False}
    table = compute_lengths(data, processor_fingerprint="p", **options)
    for i in range(30):
        item = data[i]
        images = 0 if item["pixel_values"] is None else len(item["pixel_values"])
        supervised = int((item["labels"][1:] != -100).sum())
        assert table.values[i].tolist() == [len(item["input_ids"]), images, supervised, 0]
    assert np.array_equal(compute_lengths(data, num_workers=2, progress=False).values, table.values)
    (kept,) = (tmp_path / "cache").glob("*.npy")
    with monkeypatch.context() as patch:
        patch.setattr("vlmamba.data.lengths._measure", lambda *_: pytest.fail("was computed again"))
        again = compute_lengths(data, processor_fingerprint="p", **options)
    assert np.array_equal(again.values, table.values)
    compute_lengths(data, processor_fingerprint="q", **options)
    compute_lengths(VLDataset(source, processor, max_length=31), processor_fingerprint="p", **options)
    compute_lengths(VLDataset(source, FakeProcessor(5), max_length=30), processor_fingerprint="p", **options)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 4
    kept.write_bytes(kept.read_bytes()[:50])
    assert np.array_equal(compute_lengths(data, processor_fingerprint="p", **options).values, table.values)
    assert not list((tmp_path / "cache").glob("*.tmp")), "no temporary file is left"


def test_settings_of_a_data_set(dataset: VLDataset, processor: FakeProcessor) -> None:
    with pytest.raises(ConfigError, match="image_position is 'start'; it is 'inline' or 'front'"):
        VLDataset(dataset.mixture, processor, image_position="start")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_length is 1"):
        VLDataset(dataset.mixture, processor, max_length=1)


def test_check_lists_every_problem(write: WriteRows, root: Path) -> None:
    rows = many_rows(9)
    rows[1]["image"] = "gone.png"
    rows[2]["image"] = "b.jpg"
    rows[3] = {"id": "empty", "conversations": []}
    rows[4]["image"] = "../secret.png"
    (root / "cut.png").write_bytes((root / "a.png").read_bytes()[:-30])
    rows[5]["image"] = "cut.png"
    source = write(rows)
    report = check(source)
    assert (report.rows, report.ok) == (9, False)
    assert [(p.row, p.kind) for p in report.problems] == [
        (1, "image"),
        (3, "shape"),
        (4, "image"),
        (5, "image"),
    ]
    assert report.events == {"image_suffix_replaced": 1}
    text = report.text()
    assert "9 rows, 3 images, 4 rows that cannot be used\n  3 image\n  1 shape" in text
    assert "1 image_suffix_replaced (e.g. " in text
    assert "rows.json:row 3 (id 'empty'): 'conversations' is empty" in text
    assert text.splitlines()[-1].startswith(f"{source.rows.path}:row 5 (id 'r5'): image {root}/cut.png")
    assert report.text(limit=1).endswith("... and 3 more")
    assert check([source], decode=False).images == 0
    assert check([source], limit=1).ok


def test_missing_folders_are_found_without_opening_pictures(write: WriteRows, root: Path) -> None:
    rows = many_rows(4, images=("a.png", "gqa/images/1.jpg", "own/2.jpg", "a.png"))
    found = missing_folders(write(rows))
    assert found == {
        root / "gqa" / "images": "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
        root / "own": None,
    }


def test_workers_outlive_a_signal_to_the_process_group():
    import multiprocessing
    import os
    import signal
    import time

    from vlmamba.data.loader import leave_signals_to_the_parent

    def work():
        leave_signals_to_the_parent(0)
        ready.set()
        time.sleep(60)

    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=work, daemon=True)
    worker.start()
    assert ready.wait(30)
    for each in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, each)
    time.sleep(0.3)
    assert worker.is_alive()
    worker.kill()
    worker.join(10)
