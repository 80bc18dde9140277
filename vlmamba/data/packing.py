"""Packing: the samples of an optimizer step laid one after another into rows, instead of padded side by side.

A packing is a pure function of the step's samples, their sizes and the number of ranks. It never moves a sample
to another step, so what is learnt in a step is the same as without packing, and there is no buffer whose content
a resumed run would have to restore.

Rows are balanced rather than filled: with as few rows as hold the step, samples go, the largest first, to the row
with the least work so far (Graham, "Bounds on Multiprocessing Timing Anomalies", 1969), where a token of the language
model counts one and an image `IMAGE_WORK`. So the ranks of a step wait for one another as little as its samples allow.
When the balanced rows overflow, the same number is tried by best fit (Johnson et al., "Worst-Case Performance Bounds
for Simple One-Dimensional Packing Algorithms", 1974) before rows are added.

n samples of a step, m rows.
"""

from __future__ import annotations

import numpy as np

PACK_MULTIPLE = 64
"""Packed rows are rounded up to a multiple of this: whole tiles for matrix products, few shapes for kernels."""
IMAGE_WORK = 64
"""What encoding an image costs, in tokens of the language model: a frozen SigLIP-SO400M reads 729 patches in 2 x 0.43e9
x 729 = 0.63e12 FLOPs; a token of a 2.8B model takes 11e9 (frozen, gradients passed on) or 17e9 (trained)."""


def pack(lengths: np.ndarray, num_images: np.ndarray, budget: int, *, ranks: int = 1) -> list[list[int]]:
    """Divide the samples of a step among rows.

    Args:
        lengths: (n,) tokens of each sample, none above `budget`.
        num_images: (n,) images of each sample.
        budget: The most tokens of a row.
        ranks: The number of rows is a multiple of it.

    Returns:
        Positions 0..n-1, each once; m rows, the one with the most tokens first. Rows are empty only when there
        are fewer samples than rows.
    """
    count = max(-(-int(lengths.sum()) // budget), 1)
    work = lengths + IMAGE_WORK * num_images
    by_work, by_length = (np.argsort(-size, kind="stable") for size in (work, lengths))
    while True:
        count = -(-count // ranks) * ranks
        rows = _place(by_work, lengths, work, budget, count, best_fit=False)
        rows = rows or _place(by_length, lengths, work, budget, count, best_fit=True)
        if rows is not None:
            break
        count += 1
    return sorted(rows, key=lambda row: -int(lengths[row].sum()))


def _place(
    order: np.ndarray, lengths: np.ndarray, work: np.ndarray, budget: int, count: int, *, best_fit: bool
) -> list[list[int]] | None:
    """Samples in the order given, each into one of `count` rows; None when one fits into none of them.

    With `best_fit` into the row it fills best, otherwise into that with the least work.
    """
    rows: list[list[int]] = [[] for _ in range(count)]
    tokens = np.zeros(count, dtype=np.int64)
    done = np.zeros(count, dtype=np.int64)
    for sample in order.tolist():
        fits = tokens + lengths[sample] <= budget
        if not fits.any():
            return None
        if best_fit:
            row = int(np.argmax(np.where(fits, tokens, -1)))
        else:
            row = int(np.argmin(np.where(fits, done, np.iinfo(np.int64).max)))
        rows[row].append(sample)
        tokens[row] += lengths[sample]
        done[row] += work[sample]
    return rows
