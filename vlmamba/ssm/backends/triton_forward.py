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
    offsets,
    place,
    position,
    resets,
    sigmoid,
    store,
    time_steps,
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
    u = x.u + batch * strides.u[0] + origin * strides.u[2]
    dt = x.dt + batch * strides.dt[0] + origin * strides.dt[2]
    B = x.B + batch * strides.B[0] + group * strides.B[2]
    C = x.C + batch * strides.C[0] + group * strides.C[2]
    y += batch * cut.length * total + origin
    at_u = offsets(columns, strides.u[1], strides.u[2], backwards, STEPS)
    at_dt = offsets(columns, strides.dt[1], strides.dt[2], backwards, STEPS)
    at_B = offsets(n, strides.B[1], strides.B[3], backwards, STEPS)
    at_C = offsets(n, strides.C[1], strides.C[3], backwards, STEPS)
    at_y = offsets(columns, total, 1, backwards, STEPS)
    if x.z is not None:
        z = x.z + batch * strides.z[0] + origin * strides.z[2]
        at_z = offsets(columns, strides.z[1], strides.z[2], backwards, STEPS)
    if x.D is not None:
        skip = load(x.D + origin + columns, inside)
    if x.bias is not None:
        bias = load(x.bias + origin + columns, inside)
    ids = x.ids
    if x.ids is not None:
        ids += batch * strides.ids[0]
    at_state = n[:, None] * total + columns[None, :]
    h = tl.zeros((N, BLOCK), tl.float32)
    if start is not None:
        start += batch * start_strides[0] + split * start_strides[1] + origin * start_strides[3]
        h = load(start + n[:, None] * start_strides[2] + columns[None, :] * start_strides[3], kept)
    blocks = (cut.length + KEEP - 1) // KEEP
    end = min(cut.length, (split + 1) * cut.split_length)
    for first in range(split * cut.split_length, end, STEPS):
        if saved is not None:
            if first % KEEP == 0:
                store(
                    saved + (batch * blocks + first // KEEP) * cut.size * total + origin + at_state, h, kept
                )
        at = position(first, cut.length, backwards)
        live = first + tl.arange(0, STEPS) < cut.length
        mask = live[:, None] & inside[None, :]
        rows = live[:, None] & real[None, :]
        value = load(u + at * strides.u[1] + at_u, mask)
        raw = load(dt + at * strides.dt[1] + at_dt, mask)
        b = load(B + at * strides.B[1] + at_B, rows)
        c = load(C + at * strides.C[1] + at_C, rows)
        if x.bias is not None:
            raw += bias[None, :]
        delta = time_steps(raw, live, SOFTPLUS)
        h, _before, after, _decay = walk(
            h, delta, delta * value, b, A2, ids, first, cut.length, cut, backwards, N, STEPS, BLOCK
        )
        out = tl.sum(after * c[:, :, None], axis=1)
        if x.D is not None:
            out += skip[None, :] * value
        if x.z is not None:
            gate = load(z + at * strides.z[1] + at_z, mask)
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
    u = x.u + batch * strides.u[0] + origin * strides.u[2]
    dt = x.dt + batch * strides.dt[0] + origin * strides.dt[2]
    B = x.B + batch * strides.B[0] + group * strides.B[2]
    at_u = offsets(columns, strides.u[1], strides.u[2], backwards, STEPS)
    at_dt = offsets(columns, strides.dt[1], strides.dt[2], backwards, STEPS)
    at_B = offsets(n, strides.B[1], strides.B[3], backwards, STEPS)
    if x.bias is not None:
        bias = load(x.bias + origin + columns, inside)
    ids = x.ids
    if x.ids is not None:
        ids += batch * strides.ids[0]
    h = tl.zeros((N, BLOCK), tl.float32)
    elapsed = tl.zeros((BLOCK,), tl.float32)
    end = min(cut.length, (split + 1) * cut.split_length)
    for first in range(split * cut.split_length, end, STEPS):
        at = position(first, cut.length, backwards)
        live = first + tl.arange(0, STEPS) < cut.length
        mask = live[:, None] & inside[None, :]
        value = load(u + at * strides.u[1] + at_u, mask)
        raw = load(dt + at * strides.dt[1] + at_dt, mask)
        b = load(B + at * strides.B[1] + at_B, live[:, None] & real[None, :])
        if x.bias is not None:
            raw += bias[None, :]
        delta = time_steps(raw, live, SOFTPLUS)
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
    kept = (n < cut.size)[:, None] & inside[None, :]
    A2 = load_decay(x.A, strides.A, origin, columns, n, kept)
    u = x.u + batch * strides.u[0] + origin * strides.u[2]
    dt = x.dt + batch * strides.dt[0] + origin * strides.dt[2]
    B = x.B + batch * strides.B[0] + group * strides.B[2]
    at_u = offsets(columns, strides.u[1], strides.u[2], backwards, STEPS)
    at_dt = offsets(columns, strides.dt[1], strides.dt[2], backwards, STEPS)
    at_B = offsets(n, strides.B[1], strides.B[3], backwards, STEPS)
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
        at = position(first, cut.length, backwards)
        live = first + tl.arange(0, STEPS) < limit
        mask = live[:, None] & inside[None, :]
        value = load(u + at * strides.u[1] + at_u, mask)
        raw = load(dt + at * strides.dt[1] + at_dt, mask)
        b = load(B + at * strides.B[1] + at_B, live[:, None] & (n < cut.size)[None, :])
        if x.bias is not None:
            raw += bias[None, :]
        delta = time_steps(raw, live, SOFTPLUS)
        h, _before, _after, _decay = walk(
            h, delta, delta * value, b, A2, ids, first, limit, cut, backwards, N, STEPS, BLOCK
        )
    at_answer = ((batch * count + slot) * total + origin + columns[None, :]) * cut.size + n[:, None]
    store(states + at_answer, h, kept)
