"""Items to a micro-batch: padding on the right, pictures of all rows one after another.

B rows, L longest row, n images of the whole batch, C channels, S image side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from vlmamba.data.dataset import IGNORE
from vlmamba.data.types import Batch, Item

MODEL_KEYS = ("input_ids", "attention_mask", "labels", "pixel_values")
"""The keys of a batch that the model takes; all others are accounts."""


def collate(items: Sequence[Item], pad_token_id: int, *, pad_to_multiple_of: int = 1) -> Batch:
    """Pad and join.

    Args:
        items: Elements of `VLDataset`. One with a true ``filler`` has no label and is counted as padding.
        pad_token_id: What fills `input_ids`; masks come from lengths, so it may equal any real token.
        pad_to_multiple_of: Round the padded length up.

    Returns:
        ``input_ids``, ``attention_mask``, ``labels`` (B, L) int64; ``pixel_values`` (n, C, S, S), absent when
        no row has an image; ``num_images`` (list of B), ``ids``, ``sources``, ``wheres`` (lists of B),
        ``num_samples``, ``num_supervised``, ``num_tokens``, ``num_padding`` (ints), ``bad_samples``
        (records), ``events`` (name -> count).
    """
    lengths = [len(item["input_ids"]) for item in items]
    width = -(-max(lengths) // pad_to_multiple_of) * pad_to_multiple_of
    input_ids = torch.full((len(items), width), pad_token_id, dtype=torch.long)
    labels = torch.full((len(items), width), IGNORE, dtype=torch.long)
    attention_mask = torch.zeros((len(items), width), dtype=torch.long)
    for row, (item, length) in enumerate(zip(items, lengths, strict=True)):
        input_ids[row, :length] = item["input_ids"]
        labels[row, :length] = item["labels"]
        attention_mask[row, :length] = 1
    pixels = [item["pixel_values"] for item in items if item["pixel_values"] is not None]
    batch: Batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    if pixels:
        batch["pixel_values"] = torch.cat(pixels)
    real = [not item.get("filler", False) for item in items]
    num_tokens = sum(length for length, counts in zip(lengths, real, strict=True) if counts)
    events: Counter[str] = Counter()
    for item, counts in zip(items, real, strict=True):
        events.update(item.get("events", {}) if counts else {})
    batch.update(
        num_images=[0 if item["pixel_values"] is None else len(item["pixel_values"]) for item in items],
        ids=[item["id"] for item in items],
        sources=[item.get("source", "") for item in items],
        wheres=[item.get("where", "") for item in items],
        num_samples=sum(real),
        num_supervised=int((labels[:, 1:] != IGNORE).sum()),
        num_tokens=num_tokens,
        num_padding=len(items) * width - num_tokens,
        bad_samples=[record for item in items for record in item.get("bad", [])],
        events=dict(events),
    )
    return batch
