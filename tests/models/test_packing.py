"""Rows packed from several samples, through the whole model: values and every gradient equal the samples alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from vlmamba.data import MODEL_KEYS, collate
from vlmamba.testing import tiny_model
from vlmamba.testing.models import TINY_OPTIONS

CONNECTORS = sorted(TINY_OPTIONS)


def sample(processor, length: int, images: int, seed: int):
    """Ids with whole images between random text, labels on about half of the text, pixels."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, 350, (length,), generator=generator)
    placeholder = torch.full((processor.num_image_tokens,), processor.image_token_id)
    pieces = [text[:2]]
    for _ in range(images):
        pieces += [placeholder, text[2:3]]
    ids = torch.cat([*pieces, text[3:]])
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.5, -100)
    labels[ids == processor.image_token_id] = -100
    labels[-1] = ids[-1]
    pixels = torch.randn(images, 3, 16, 16, generator=generator)
    return ids, labels, pixels


def packed(rows):
    """Samples, row by row, as one batch: ids, labels, seq_idx (padding is a segment of its own), mask, pixels."""
    width = max(sum(s[0].numel() for s in row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels, seq_idx = torch.full_like(ids, -100), torch.full_like(ids, -1, dtype=torch.int32)
    for i, row in enumerate(rows):
        end = 0
        for number, (one, wanted, _) in enumerate(row):
            start, end = end, end + one.numel()
            ids[i, start:end], labels[i, start:end], seq_idx[i, start:end] = one, wanted, number
    pixels = torch.cat([s[2] for row in rows for s in row])
    return {
        "input_ids": ids,
        "labels": labels,
        "seq_idx": seq_idx,
        "attention_mask": (seq_idx >= 0).long(),
        "pixel_values": pixels if len(pixels) else None,
    }


def gradients(model, batches, num_items):
    """The summed loss and the gradient of every parameter that has one."""
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        loss = model(**batch, num_items=num_items).loss
        loss.backward()
        total = total + loss.detach()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def alone(one):
    ids, labels, pixels = one
    return {"input_ids": ids[None], "labels": labels[None], "pixel_values": pixels if len(pixels) else None}


def rows_of(processor):
    """Two rows: three samples with one, two and no images; two samples, the first very short."""
    return [
        [sample(processor, 7, 1, 1), sample(processor, 9, 2, 2), sample(processor, 6, 0, 3)],
        [sample(processor, 3, 0, 4), sample(processor, 12, 1, 5)],
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("connector", CONNECTORS)
def test_loss_and_every_gradient_equal_the_samples_alone(connector, checkpointing):
    model, processor = tiny_model(connector)
    model.vision_tower.requires_grad_(True)
    if checkpointing:
        for block in model.language_model.backbone.layers:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        model.train()
    rows = rows_of(processor)
    singles = [one for row in rows for one in row]
    items = sum(int((labels[1:] != -100).sum()) for _, labels, _ in singles)
    loss, found = gradients(model, [packed(rows)], items)
    expected, wanted = gradients(model, [alone(one) for one in singles], items)
    assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert found.keys() == wanted.keys()
    assert any(name.startswith("vision_tower") for name in found)
    for name, gradient in found.items():
        scale = wanted[name].abs().max().clamp(min=1e-4)
        assert_close(
            gradient / scale, wanted[name] / scale, atol=2e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("connector", CONNECTORS)
def test_the_order_of_samples_within_a_row_changes_nothing(connector):
    model, processor = tiny_model(connector)
    first, second, third = rows_of(processor)[0]
    with torch.no_grad():
        one = model(**packed([[first, second, third]]), logits_to_keep=0)
        other = model(**packed([[third, first, second]]), logits_to_keep=0)
    assert_close(one.loss, other.loss, atol=1e-5, rtol=1e-5)
    split = one.logits[0].split([s[0].numel() for s in (first, second, third)])
    again = other.logits[0].split([s[0].numel() for s in (third, first, second)])
    assert_close(torch.cat([split[2], split[0], split[1]]), torch.cat(again), atol=1e-5, rtol=1e-5)


def test_without_seq_idx_samples_do_mix():
    """The tests above could not fail if nothing passed between neighbours anyway."""
    model, processor = tiny_model()
    batch = packed([rows_of(processor)[0]])
    with torch.no_grad():
        apart = model(**batch, logits_to_keep=0).logits
        mixed = model(**{**batch, "seq_idx": None}, logits_to_keep=0).logits
    first = rows_of(processor)[0][0][0].numel()
    assert_close(apart[:, :first], mixed[:, :first], atol=1e-5, rtol=1e-5)
    assert (apart[:, first:] - mixed[:, first:]).abs().max() > 1e-2


def test_an_image_of_one_sample_has_no_gradient_from_another():
    model, processor = tiny_model("qmamba")
    batch = packed([rows_of(processor)[0]])
    batch["pixel_values"].requires_grad_()
    batch["labels"][batch["seq_idx"] != 1] = -100
    model(**batch).loss.backward()
    norms = batch["pixel_values"].grad.flatten(1).norm(dim=1)
    assert norms[0] == 0
    assert (norms[1:] > 0).all()


@pytest.mark.parametrize("language", ["mamba", "llama", "jamba"])
def test_training_batches_need_no_mask(language):
    """Padding on the right without labels: the mask changes no bit of the loss, and none of a gradient.

    A hybrid's mask makes its attention add in another order, so its gradients agree to rounding.
    """
    model, processor = tiny_model(language=language)
    model.train()
    items = []
    for length, images in ((9, 1), (23, 0), (40, 2)):
        ids, labels, pixels = sample(processor, length, images, seed=length)
        items.append(
            {"input_ids": ids, "labels": labels, "pixel_values": pixels if images else None, "id": length}
        )
    batch = collate(items, processor.pad_token_id)
    inputs = {key: batch[key] for key in MODEL_KEYS if key in batch}
    assert "attention_mask" not in inputs and batch["num_padding"] > 0
    mask = torch.zeros_like(inputs["input_ids"])
    for row, item in enumerate(items):
        mask[row, : len(item["input_ids"])] = 1
    found = []
    for extra in ({}, {"attention_mask": mask}):
        model.zero_grad()
        loss = model(**inputs, **extra).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    plain, masked = found
    assert len(plain) == len(masked) > 20 and torch.equal(plain[0], masked[0])
    for one, other in zip(plain, masked, strict=True):
        scale = other.abs().max().clamp(min=1e-3)
        assert torch.equal(one, other) if language != "jamba" else ((one - other).abs().max() / scale) < 4e-5
