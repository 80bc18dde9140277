# mypy: allow-untyped-defs, allow-untyped-decorators
# ruff: noqa: SIM102  (the compiler decides `is not None` by itself, but not as a part of `and`)
"""Triton kernels of the selective scan's forward pass.

Time may be cut into splits that run at the same time, for calls with few rows and channels. Then
`local_states` scans every split from a zero state, `combine` turns the ends into the state each split starts
from (the decay over a split is exp(A sum(delta)): one exponential), and `scan_forward` scans all of them again,
from there. With one split only `scan_forward` runs.

Shape legend: B batch, L length, D channels, N state size, G groups, S splits, K steps between saved states,
T steps of a tile, C channels of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vlmamba.ssm.backends.triton_tiles import (
    load,
    load_decay,
    load_start,
    load_tile,
    matrix_rows_of,
    offsets,
    place,
    position,
    resets,
    rows_of,
    sigmoid,
    store,
    take,
    walk,
)


@triton.jit(do_not_specialize=["one"])
def scan_forward(x, strides, cut, one, start, start_strides, y, saved, last,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Fill y (B, L, D), the state before every K-th step (`saved`, (B, ceil(L / K), N, D)), the last (B, D, N).

    `start` holds the state each split starts from, with the strides of (B, S, N, D).
    """
    batch, split, group, _tile, origin, columns, inside = place(cut, one, BLOCK)
    backwards = (cut.reverse >> group) & 1
    total = cut.groups * cut.width
    n = tl.arange(0, N)
    real = n < cut.size
    kept = real[:, None] & inside[None, :]
    A2 = load_decay(x.A, strides.A, origin, columns, n, kept)
    u = rows_of(x.u, strides.u, batch, origin, columns, backwards, STEPS)
    dt = rows_of(x.dt, strides.dt, batch, origin, columns, backwards, STEPS)
    B = matrix_rows_of(x.B, strides.B, batch, group, n, backwards, STEPS)
    C = matrix_rows_of(x.C, strides.C, batch, group, n, backwards, STEPS)
    y += batch * cut.length * total + origin
    at_y = offsets(columns, total, 1, backwards, STEPS)
    if x.z is not None:
        z = rows_of(x.z, strides.z, batch, origin, columns, backwards, STEPS)
    if x.D is not None:
        skip = load(x.D + origin + columns, inside)
    bias = None
    if x.bias is not None:
        bias = load(x.bias + origin + columns, inside)
    ids = x.ids
    if x.ids is not None:
        ids += batch * strides.ids[0]
    at_state = n[:, None] * total + columns[None, :]
    h = tl.zeros((N, BLOCK), tl.float32)
    if start is not None:
        h = load_start(start, start_strides, batch, split, origin, columns, n, kept)
    blocks = (cut.length + KEEP - 1) // KEEP
    end = min(cut.length, (split + 1) * cut.split_length)
    for first in range(split * cut.split_length, end, STEPS):
        if saved is not None:
            if first % KEEP == 0:
                store(
                    saved + (batch * blocks + first // KEEP) * cut.size * total + origin + at_state, h, kept
                )
        at, _live, mask, rows, value, _raw, delta, b = load_tile(
            u, dt, B, bias, first, cut.length, cut, backwards, inside, real, SOFTPLUS, STEPS
        )
        c = take(C, at, rows)
        h, _before, after, _decay = walk(
            h, delta, delta * value, b, A2, ids, first, cut.length, cut, backwards, N, STEPS, BLOCK
        )
        out = tl.sum(after * c[:, :, None], axis=1)
        if x.D is not None:
            out += skip[None, :] * value
        if x.z is not None:
            gate = take(z, at, mask)
            out *= gate * sigmoid(gate)
        store(y + at * total + at_y, out, mask)
    if last is not None:
        if split == cut.splits - 1:
            last += batch * total * cut.size + origin * cut.size
            store(last + columns[None, :] * cut.size + n[:, None], h, kept)


@triton.jit(do_not_specialize=["one"])
def local_states(x, strides, cut, one, ends, sums,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Of each split: its end when it starts from zero (B, S, N, D), and the sum of delta (B, S, D).

    The sum is infinite where a segment starts in the split: nothing of what was before it is left.
    """
    batch, split, group, _tile, origin, columns, inside = place(cut, one, BLOCK)
    backwards = (cut.reverse >> group) & 1
    total = cut.groups * cut.width
    n = tl.arange(0, N)
    real = n < cut.size
    kept = real[:, None] & inside[None, :]
    A2 = load_decay(x.A, strides.A, origin, columns, n, kept)
    u = rows_of(x.u, strides.u, batch, origin, columns, backwards, STEPS)
    dt = rows_of(x.dt, strides.dt, batch, origin, columns, backwards, STEPS)
    B = matrix_rows_of(x.B, strides.B, batch, group, n, backwards, STEPS)
    bias = None
    if x.bias is not None:
        bias = load(x.bias + origin + columns, inside)
    ids = x.ids
    if x.ids is not None:
        ids += batch * strides.ids[0]
    h = tl.zeros((N, BLOCK), tl.float32)
    elapsed = tl.zeros((BLOCK,), tl.float32)
    end = min(cut.length, (split + 1) * cut.split_length)
    for first in range(split * cut.split_length, end, STEPS):
        _at, _live, _mask, _rows, value, _raw, delta, b = load_tile(
            u, dt, B, bias, first, cut.length, cut, backwards, inside, real, SOFTPLUS, STEPS
        )
        h, _before, _after, _decay = walk(
            h, delta, delta * value, b, A2, ids, first, cut.length, cut, backwards, N, STEPS, BLOCK
        )
        elapsed += tl.sum(delta, axis=0)
        if x.ids is not None:
            elapsed += resets(ids, first, cut, backwards, STEPS)
    part = (batch * cut.splits + split) * total
    store(ends + part * cut.size + origin + n[:, None] * total + columns[None, :], h, kept)
    store(sums + part + origin + columns, elapsed, inside)


@triton.jit(do_not_specialize=["one"])
def combine(A, A_strides, cut, one, ends, sums, initial, initial_strides, starts,
    BACKWARD: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What each split starts from (B, S, N, D): h[s + 1] = exp(A sums[s]) h[s] + ends[s], h[0] = initial.

    A grid without splits. BACKWARD goes from the last split to the first: the same for gradients. `initial`
    (B, D, N) or None.
    """
    program = tl.program_id(0)
    tiles = cut.groups * cut.tiles
    total = cut.groups * cut.width
    batch = (program // tiles).to(tl.int64)
    group = program % tiles // cut.tiles
    tile = program % cut.tiles
    columns = tl.arange(0, BLOCK) * one
    inside = tile * BLOCK + tl.arange(0, BLOCK) < cut.width
    origin = (group * cut.width + tile * BLOCK).to(tl.int64)
    n = tl.arange(0, N)
    kept = (n < cut.size)[:, None] & inside[None, :]
    A2 = load_decay(A, A_strides, origin, columns, n, kept)
    h = tl.zeros((N, BLOCK), tl.float32)
    if initial is not None:
        initial += batch * initial_strides[0] + origin * initial_strides[1]
        h = load(initial + n[:, None] * initial_strides[2] + columns[None, :] * initial_strides[1], kept)
    at_state = origin + n[:, None] * total + columns[None, :]
    for i in range(cut.splits):
        split = i
        if BACKWARD:
            split = cut.splits - 1 - i
        part = (batch * cut.splits + split) * total
        store(starts + part * cut.size + at_state, h, kept)
        elapsed = load(sums + part + origin + columns, inside)
        end = load(ends + part * cut.size + at_state, kept)
        h = tl.where(elapsed[None, :] == float("inf"), 0.0, tl.exp2(elapsed[None, :] * A2) * h) + end


@triton.jit(do_not_specialize=["one"])
def states_at(x, strides, cut, one, saved, places, states, count,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Fill (B, R, D, N): the states after the positions `places` (B, R), `count` = R, from the saved ones.

    The splits of `cut` are the asked states.
    """
    batch, slot, group, _tile, origin, columns, inside = place(cut, one, BLOCK)
    backwards = (cut.reverse >> group) & 1
    total = cut.groups * cut.width
    n = tl.arange(0, N)
    real = n < cut.size
    kept = real[:, None] & inside[None, :]
    A2 = load_decay(x.A, strides.A, origin, columns, n, kept)
    u = rows_of(x.u, strides.u, batch, origin, columns, backwards, STEPS)
    dt = rows_of(x.dt, strides.dt, batch, origin, columns, backwards, STEPS)
    B = matrix_rows_of(x.B, strides.B, batch, group, n, backwards, STEPS)
    bias = None
    if x.bias is not None:
        bias = load(x.bias + origin + columns, inside)
    ids = x.ids
    if x.ids is not None:
        ids += batch * strides.ids[0]
    limit = position(tl.load(places + batch * count + slot), cut.length, backwards).to(tl.int32) + 1
    block = (limit - 1) // KEEP
    blocks = (cut.length + KEEP - 1) // KEEP
    at_state = origin + n[:, None] * total + columns[None, :]
    h = load(saved + (batch * blocks + block) * cut.size * total + at_state, kept)
    for first in range(block * KEEP, limit, STEPS):
        _at, _live, _mask, _rows, value, _raw, delta, b = load_tile(
            u, dt, B, bias, first, limit, cut, backwards, inside, real, SOFTPLUS, STEPS
        )
        h, _before, _after, _decay = walk(
            h, delta, delta * value, b, A2, ids, first, limit, cut, backwards, N, STEPS, BLOCK
        )
    at_answer = ((batch * count + slot) * total + origin + columns[None, :]) * cut.size + n[:, None]
    store(states + at_answer, h, kept)
