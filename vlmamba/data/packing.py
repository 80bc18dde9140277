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

import bisect
import heapq

import numpy as np

PACK_MULTIPLE = 64
"""Packed rows are rounded up to a multiple of this: whole tiles for matrix products, few shapes for kernels."""
IMAGE_WORK = 64
"""What encoding an image costs, in tokens of the language model: a frozen SigLIP-SO400M reads 729 patches in 2 x 0.43e9
x 729 = 0.63e12 FLOPs; a token of a 2.8B model takes 11e9 (frozen, gradients passed on) or 17e9 (trained)."""


def pack(lengths: np.ndarray, num_images: np.ndarray, budget: int, *, ranks: int = 1) -> list[list[int]]:
    """Divide the samples of a step among as few rows as hold them.

    Args:
        lengths: (n,) tokens of each sample, none above `budget`.
        num_images: (n,) images of each sample.
        budget: The most tokens of a row.
        ranks: The number of rows is a multiple of it.

    Returns:
        See `pack_into`.
    """
    count = max(-(-int(lengths.sum()) // budget), 1)
    while True:
        count = -(-count // ranks) * ranks
        rows = pack_into(lengths, num_images, budget, count)
        if rows is not None:
            return rows
        count += 1


def pack_into(lengths: np.ndarray, num_images: np.ndarray, budget: int, count: int) -> list[list[int]] | None:
    """Divide the samples of a step among `count` rows.

    Returns:
        Positions 0..n-1, each once; m rows, the one with the most tokens first. Rows are empty only when there
        are fewer samples than rows. None: they do not fit.
    """
    if int(lengths.sum()) > budget * count:
        return None
    work = lengths + IMAGE_WORK * num_images
    rows = _balance(lengths, work, budget, count)
    rows = rows or _best_fit(lengths, budget, count)
    return None if rows is None else sorted(rows, key=lambda row: -int(lengths[row].sum()))


def _balance(lengths: np.ndarray, work: np.ndarray, budget: int, count: int) -> list[list[int]] | None:
    """Samples, the most work first, each into the row with the least work of those that hold it."""
    rows: list[list[int]] = [[] for _ in range(count)]
    left = [budget] * count
    queue = [(0, row) for row in range(count)]
    sizes, works = lengths.tolist(), work.tolist()
    for sample in np.argsort(-work, kind="stable").tolist():
        full = []
        while queue and left[queue[0][1]] < sizes[sample]:
            full.append(heapq.heappop(queue))
        if not queue:
            return None
        done, row = queue[0]
        heapq.heapreplace(queue, (done + works[sample], row))
        rows[row].append(sample)
        left[row] -= sizes[sample]
        for entry in full:
            heapq.heappush(queue, entry)
    return rows


def _best_fit(lengths: np.ndarray, budget: int, count: int) -> list[list[int]] | None:
    """Samples, the longest first, each into the row that it fills best."""
    rows: list[list[int]] = [[] for _ in range(count)]
    left = [(budget, row) for row in range(count)]
    for sample in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[sample])
        place = bisect.bisect_left(left, (size, -1))
        if place == count:
            return None
        room, row = left.pop(place)
        rows[row].append(sample)
        bisect.insort(left, (room - size, row))
    return rows
