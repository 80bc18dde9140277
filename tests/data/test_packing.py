"""Packed rows: the plan's laws, the batch, and that a packed sample learns what it learns alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.conftest import chat
from vlmamba.data import (
    MODEL_KEYS,
    LLaVASource,
    Loader,
    PlanSettings,
    Step,
    VLDataset,
    build_loader,
    collate,
    compute_lengths,
    pack,
    plan_epoch,
)
from vlmamba.data.packing import IMAGE_WORK
from vlmamba.errors import ConfigError
from vlmamba.testing import tiny_model, write_images

RNG = np.random.default_rng(5)
LENGTHS = np.clip(RNG.lognormal(4.5, 0.7, 400), 8, 500).astype(np.int64)
IMAGES = (RNG.random(400) < 0.7).astype(np.int64) + (RNG.random(400) < 0.1)
SETTINGS = PlanSettings(step_samples=32, pack_tokens=1000, pad_to_multiple_of=8, seed=1)


def packed_plan(settings: PlanSettings = SETTINGS, epoch: int = 0):
    return plan_epoch(np.arange(400), settings, epoch, lengths=LENGTHS, num_images=IMAGES)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", [500, 1000, 4000])
def test_each_sample_once_and_no_row_above_the_budget(budget: int, ranks: int) -> None:
    rows = pack(LENGTHS[:60], IMAGES[:60], budget, ranks=ranks)
    assert sorted(sample for row in rows for sample in row) == list(range(60))
    assert len(rows) % ranks == 0
    sizes = [int(LENGTHS[row].sum()) for row in rows]
    assert max(sizes) <= budget
    assert sizes == sorted(sizes, reverse=True)
    fewest = -(-LENGTHS[:60].sum() // budget)
    assert len(rows) <= -(-(fewest + 1) // ranks) * ranks


def test_best_fit_is_tried_before_a_row_is_added() -> None:
    lengths = np.array([6, 6, 5, 4, 3, 3, 3])  # balanced, the last 3 fits into neither row of 15
    rows = pack(lengths, np.zeros(7, dtype=int), 15)
    assert [sorted(lengths[row].tolist()) for row in rows] == [[3, 6, 6], [3, 3, 4, 5]]


def test_more_ranks_than_samples_leave_rows_empty() -> None:
    rows = pack(np.array([5, 9]), np.zeros(2, dtype=int), 20, ranks=4)
    assert rows == [[1], [0], [], []]


def test_images_and_tokens_are_balanced_over_ranks() -> None:
    plan = packed_plan()
    work = LENGTHS + IMAGE_WORK * IMAGES
    for step in range(len(plan) - 1):
        ranks = [[n for micro in plan.step(step, rank=r, world_size=4) for n in micro] for r in range(4)]
        loads = [work[rows].sum() for rows in ranks]
        assert max(loads) - min(loads) <= work[plan.step_rows(step)].max()
    account, random = (
        packed_plan(settings).account(world_size=4)
        for settings in (SETTINGS, PlanSettings(step_samples=32, micro_samples=8, seed=1))
    )
    assert account.idle < 0.12 < 0.4 < random.idle
    assert account.image_idle < 0.25
    assert account.images == random.images == IMAGES.sum()


def test_visual_tokens_are_balanced_on_a_mix_with_long_chats() -> None:
    generator = np.random.default_rng(0)
    images = (generator.random(2000) < 0.94).astype(np.int64)
    lengths = np.where(images, 580 + generator.integers(20, 400, 2000), generator.integers(300, 2048, 2000))
    settings = PlanSettings(step_samples=128, pack_tokens=8192, pad_to_multiple_of=64)
    account = plan_epoch(np.arange(2000), settings, 0, lengths=lengths, num_images=images).account(
        world_size=8
    )
    assert account.padding < 0.01
    assert account.idle < 0.03
    assert account.image_idle < 0.09


def test_packing_moves_no_sample_to_another_step() -> None:
    packed, padded = packed_plan(), packed_plan(PlanSettings(step_samples=32, micro_samples=8, seed=1))
    rows = [sorted(sorted(plan.step_rows(s).tolist()) for s in range(len(plan))) for plan in (packed, padded)]
    assert rows[0] == rows[1]
    assert packed.fingerprint == packed_plan().fingerprint
    assert packed.fingerprint != packed_plan(epoch=1).fingerprint


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 50])
def test_ranks_share_a_packed_step(ranks: int) -> None:
    plan = packed_plan()
    for step in range(len(plan)):
        shares = [plan.step(step, rank=rank, world_size=ranks) for rank in range(ranks)]
        assert len({len(share) for share in shares}) == 1
        real = sorted(n for share in shares for micro in share for n in micro if n >= 0)
        assert real == sorted(plan.step_rows(step).tolist())
        assert all(micro for share in shares for micro in share)


def test_the_fullest_step_comes_first() -> None:
    plan = packed_plan(PlanSettings(step_samples=8, pack_tokens=4000, seed=1))
    totals = [LENGTHS[plan.step_rows(step)].sum() for step in range(len(plan))]
    assert totals[0] == max(totals)


TOKEN_STEPS = PlanSettings(step_tokens=8 * 1000, pack_tokens=1000, pad_to_multiple_of=8, seed=1)


def test_steps_of_tokens_have_equally_many_rows_of_every_rank() -> None:
    plan = packed_plan(TOKEN_STEPS)
    assert np.array_equal(np.sort(plan.rows), np.arange(len(LENGTHS)))
    for step in range(len(plan)):
        whole = plan.micro_batches(step)
        assert len(whole) == 8
        for ranks in (2, 4, 8):
            assert plan.micro_batches(step, ranks) == whole, "the same rows on any number of ranks"
            assert {len(plan.step(step, rank=r, world_size=ranks)) for r in range(ranks)} == {8 // ranks}
        real = [[n for n in row if n >= 0] for row in whole]
        assert sorted(n for row in real for n in row) == sorted(plan.step_rows(step).tolist())
        assert max(LENGTHS[row].sum() for row in real) <= 1000


def test_steps_of_tokens_are_full_and_seeded() -> None:
    plan = packed_plan(TOKEN_STEPS)
    filled = sorted(LENGTHS[plan.step_rows(step)].sum() / 8000 for step in range(len(plan)))[1:]
    assert filled[0] > 0.8 and float(np.mean(filled)) > 0.9
    assert plan.fingerprint == packed_plan(TOKEN_STEPS).fingerprint
    assert plan.fingerprint != packed_plan(TOKEN_STEPS, epoch=1).fingerprint


def test_steps_of_tokens_leave_64_ranks_hardly_idle() -> None:
    generator = np.random.default_rng(0)
    images = (generator.random(3968) < 0.94).astype(np.int64)
    lengths = np.where(images, 580 + generator.integers(20, 400, 3968), generator.integers(300, 2048, 3968))
    common: dict[str, Any] = {"pack_tokens": 8192, "pad_to_multiple_of": 64}
    samples, tokens = (
        plan_epoch(np.arange(3968), settings, 0, lengths=lengths, num_images=images).account(world_size=64)
        for settings in (
            PlanSettings(step_samples=128, **common),
            PlanSettings(step_tokens=64 * 8192, **common),
        )
    )
    assert tokens.idle < 0.05 < 0.2 < samples.idle
    assert tokens.padding < 0.01


def test_ranks_that_cannot_share_a_step_of_tokens() -> None:
    with pytest.raises(ConfigError, match="a step of 8 packed rows cannot be shared among 3 processes"):
        packed_plan(TOKEN_STEPS).micro_batches(0, 3)
    with pytest.raises(ConfigError, match="step_tokens 2100 is not a multiple of pack_tokens 1000"):
        PlanSettings(step_tokens=2100, pack_tokens=1000)


def test_what_packing_needs() -> None:
    with pytest.raises(ConfigError, match="the longest row has 500 tokens but pack_tokens is 400"):
        packed_plan(PlanSettings(step_samples=8, pack_tokens=400))
    with pytest.raises(ConfigError, match="need the lengths of the rows"):
        plan_epoch(np.arange(4), SETTINGS, 0)
    with pytest.raises(ConfigError, match="or else pack_tokens"):
        PlanSettings(step_samples=8, pack_tokens=400, micro_samples=2)


def item(ids: list[int], labels: list[int], **more: Any) -> dict[str, Any]:
    tensors = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
    return {**tensors, "pixel_values": None, "id": ids[0], **more}


def test_a_packed_batch() -> None:
    items = [item([5, 6, 7], [5, 6, 7]), item([8, 9], [-100, 9]), item([4, 4], [-100] * 2, filler=True)]
    batch = collate(items, 0, pad_to_multiple_of=4, packed=True)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4, 4, 0]]
    assert batch["seq_idx"].tolist() == [[0, 0, 0, 1, 1, 2, 2, 3]]
    assert batch["seq_idx"].dtype == torch.int32
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9, -100, -100, -100]]
    assert "attention_mask" not in batch
    counts = {name: batch[f"num_{name}"] for name in ("samples", "supervised", "tokens", "padding")}
    assert counts == {"samples": 2, "supervised": 3, "tokens": 5, "padding": 3}


# --- the packing law, on a model --------------------------------------------------------------------------------

ANSWERS = ("a red square", "Two.", "three black dots and a line", "Top left.", "blue")


def small_task(tmp_path: Path, processor: Any, answers: tuple[str, ...] = ANSWERS) -> VLDataset:
    """Samples with no, one and two pictures."""
    names = write_images(tmp_path / "images", 4)
    images = [names[0], None, [names[1], names[2]], None, names[3]]
    rows = []
    for number, (answer, image) in enumerate(zip(answers, images, strict=True)):
        tokens = {None: "", names[0]: "<image>\n", names[3]: "<image>\n"}.get(str(image) if image else None)
        turns = chat(f"{'<image><image>' if tokens is None else tokens}What is it?", answer)
        rows.append({"id": number, "conversations": turns, **({"image": image} if image else {})})
    path = tmp_path / f"rows{len(list(tmp_path.iterdir()))}.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return VLDataset(LLaVASource(path, tmp_path / "images"), processor, max_length=200)


def learnt(model: Any, batches: list[dict[str, Any]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Summed loss and gradients."""
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        loss = model(**{key: batch[key] for key in MODEL_KEYS if key in batch}, num_items=1).loss
        loss.backward()
        total = total + loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("connector", "language"),
    [("mlp", "mamba"), ("vss-mlp", "mamba"), ("vss-l2", "mamba"), ("qmamba", "mamba"), ("vss-l2", "llama")],
)
def test_a_packed_row_learns_the_sum_of_its_samples(connector: str, language: str, tmp_path: Path) -> None:
    model, processor = tiny_model(connector, language=language)
    model.train()
    items = list(map(small_task(tmp_path, processor).__getitem__, range(5)))
    packed = collate(items, processor.pad_token_id, pad_to_multiple_of=64, packed=True)
    alone = [collate([item], processor.pad_token_id) for item in items]
    assert packed["num_supervised"] == sum(batch["num_supervised"] for batch in alone) > 20
    loss, gradients = learnt(model, [packed])
    loss_alone, gradients_alone = learnt(model, alone)
    torch.testing.assert_close(loss, loss_alone, atol=1e-4, rtol=1e-5)
    assert gradients.keys() == gradients_alone.keys()
    assert any("multi_modal_projector" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, gradients_alone[name], atol=1e-4, rtol=1e-4, msg=name)


def losses_of_samples(model: Any, batch: dict[str, Any]) -> list[float]:
    """The loss of each sample of a packed row."""
    losses = []
    for number in range(len(batch["ids"])):
        labels = torch.where(batch["seq_idx"] == number, batch["labels"], -100)
        inputs = {key: batch[key] for key in MODEL_KEYS if key in batch} | {"labels": labels}
        with torch.no_grad():
            losses.append(float(model(**inputs, num_items=1).loss))
    return losses


def test_changing_one_sample_moves_no_other_loss(tmp_path: Path) -> None:
    model, processor = tiny_model("vss-l2")
    pad = processor.pad_token_id
    items = list(map(small_task(tmp_path, processor).__getitem__, range(5)))
    before = losses_of_samples(model, collate(items, pad, packed=True))
    other = small_task(tmp_path, processor, (*ANSWERS[:2], "nothing at all, is it?", *ANSWERS[3:]))
    items[2] = other[2]
    items[2]["pixel_values"] = items[2]["pixel_values"] + 1
    after = losses_of_samples(model, collate(items, pad, packed=True))
    assert after[2] != pytest.approx(before[2], rel=1e-3)
    for number in (0, 1, 3, 4):
        assert after[number] == pytest.approx(before[number], rel=1e-6)


# --- the loader -------------------------------------------------------------------------------------------------


def packed_loader(dataset: VLDataset, **options: Any) -> Loader:
    settings = PlanSettings(step_samples=8, pack_tokens=128, pad_to_multiple_of=16)
    return build_loader(dataset, settings, lengths=compute_lengths(dataset, progress=False), **options)


def test_packed_steps_of_any_number_of_ranks_hold_the_same_samples(dataset: VLDataset) -> None:
    alone: list[Step] = list(packed_loader(dataset))
    for ranks in (2, 3, 5):
        shares = [list(packed_loader(dataset, rank=rank, world_size=ranks)) for rank in range(ranks)]
        for whole, *parts in zip(alone, *shares, strict=True):
            assert len({len(part.micro_batches) for part in parts}) == 1
            for name in ("num_samples", "num_supervised", "num_tokens"):
                assert getattr(whole, name) == sum(getattr(part, name) for part in parts)


@pytest.mark.parametrize(("before", "after"), [(1, 3), (4, 1), (2, 5)])
def test_a_run_goes_on_with_another_number_of_ranks(dataset: VLDataset, before: int, after: int) -> None:
    def ids(steps: list[Step]) -> list[str]:
        real = (b["ids"][: b["num_samples"]] for step in steps for b in step.micro_batches)
        return sorted(name for names in real for name in names)

    whole = list(packed_loader(dataset))
    first = packed_loader(dataset, rank=before - 1, world_size=before)
    steps = iter(first)
    next(steps), next(steps)
    state = json.loads(json.dumps(first.state_dict()))
    loaders = [packed_loader(dataset, rank=rank, world_size=after) for rank in range(after)]
    for loader in loaders:
        loader.load_state_dict(state)
    rest = [list(loader) for loader in loaders]
    for number, step in enumerate(whole[2:]):
        parts = [steps_of_rank[number] for steps_of_rank in rest]
        assert ids(parts) == ids([step])
        assert {part.index for part in parts} == {step.index}


def test_fillers_of_packed_steps_learn_nothing(dataset: VLDataset) -> None:
    ranks = [list(packed_loader(dataset, rank=rank, world_size=12)) for rank in range(12)]
    for steps in zip(*ranks, strict=True):
        idle = [step for step in steps if step.num_samples == 0]
        assert idle, "steps of at most 8 samples leave ranks of 12 without work"
        for step in idle:
            assert step.num_supervised == step.num_tokens == 0
            assert (step.micro_batches[0]["labels"] == -100).all()
