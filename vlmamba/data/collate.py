"""Items to a micro-batch: side by side with padding on the right, or packed one after another into one row;
pictures of all samples one after another.

Padding follows the real tokens and has no labels: what is causal needs no mask to leave it out.

B rows, L longest row, n images of the whole batch, C channels, S image side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from vlmamba.common.vocabulary import IGNORE_INDEX
from vlmamba.data.pixels import PixelBuffer
from vlmamba.data.types import Batch, Item

MODEL_KEYS = ("input_ids", "labels", "seq_idx", "pixel_values")
"""The keys of a batch that the model takes; all others are accounts."""


def collate(
    items: Sequence[Item],
    pad_token_id: int,
    *,
    pad_to_multiple_of: int = 1,
    packed: bool = False,
    buffer: PixelBuffer | None = None,
) -> Batch:
    """Pad and join, or pack and join.

    Args:
        items: Elements of `VLDataset`. One with a true ``filler`` has no label and is counted as padding.
        pad_token_id: What fills `input_ids`; masks come from lengths, so it may equal any real token.
        pad_to_multiple_of: Round the length up.
        packed: One row of all items instead of one row an item.
        buffer: Where the pictures of the items already stand, in their order.

    Returns:
        ``input_ids``, ``labels`` (B, L) int64; packed: ``seq_idx`` (1, L) int32, the number of the sample at each
        position, padding at the end a sample of its own without labels;
        ``pixel_values`` (n, C, S, S), absent when no item has an image; ``num_images``, ``ids``, ``sources``,
        ``wheres`` (lists, one entry an item), ``num_samples``, ``num_supervised``, ``num_tokens``,
        ``num_padding`` (ints), ``bad_samples`` (records), ``events`` (name -> count).
    """
    lengths = [len(item["input_ids"]) for item in items]
    width = sum(lengths) if packed else max(lengths)
    width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
    batch = (_one_row if packed else _side_by_side)(items, lengths, width, pad_token_id)
    pixels = [item["pixel_values"] for item in items if item["pixel_values"] is not None]
    if pixels:
        batch["pixel_values"] = buffer.whole() if buffer is not None and buffer.used else torch.cat(pixels)
    batch.update(_accounts(items, lengths, batch["labels"]))
    return batch


def _side_by_side(items: Sequence[Item], lengths: Sequence[int], width: int, pad: int) -> Batch:
    input_ids = torch.full((len(items), width), pad, dtype=torch.long)
    labels = torch.full((len(items), width), IGNORE_INDEX, dtype=torch.long)
    for row, (item, length) in enumerate(zip(items, lengths, strict=True)):
        input_ids[row, :length] = item["input_ids"]
        labels[row, :length] = item["labels"]
    return {"input_ids": input_ids, "labels": labels}


def _one_row(items: Sequence[Item], lengths: Sequence[int], width: int, pad: int) -> Batch:
    input_ids = torch.full((1, width), pad, dtype=torch.long)
    labels = torch.full((1, width), IGNORE_INDEX, dtype=torch.long)
    seq_idx = torch.full((1, width), len(items), dtype=torch.int32)
    begin = 0
    for number, (item, length) in enumerate(zip(items, lengths, strict=True)):
        end = begin + length
        input_ids[0, begin:end] = item["input_ids"]
        labels[0, begin + 1 : end] = item["labels"][1:]  # no sample predicts the first token of the next
        seq_idx[0, begin:end] = number
        begin = end
    return {"input_ids": input_ids, "seq_idx": seq_idx, "labels": labels}


def _accounts(items: Sequence[Item], lengths: Sequence[int], labels: torch.Tensor) -> Batch:
    real = [not item.get("filler", False) for item in items]
    num_tokens = sum(length for length, counts in zip(lengths, real, strict=True) if counts)
    events: Counter[str] = Counter()
    for item, counts in zip(items, real, strict=True):
        events.update(item.get("events", {}) if counts else {})
    return {
        "num_images": [0 if item["pixel_values"] is None else len(item["pixel_values"]) for item in items],
        "ids": [item["id"] for item in items],
        "sources": [item.get("source", "") for item in items],
        "wheres": [item.get("where", "") for item in items],
        "num_samples": sum(real),
        "num_supervised": int((labels[:, 1:] != IGNORE_INDEX).sum()),
        "num_tokens": num_tokens,
        "num_padding": labels.numel() - num_tokens,
        "bad_samples": [record for item in items for record in item.get("bad", [])],
        "events": dict(events),
    }
