# mypy: allow-untyped-defs, allow-untyped-decorators
# ruff: noqa: SIM102  (the compiler decides `is not None` by itself, but not as a part of `and`)
"""Triton kernels of the selective scan's backward pass.

A program walks its part of time from the end, from one saved state to the one before it: it scans the K steps
between them again, and then goes back through them tile by tile with the gradient of the state. Nothing is
added up by atomics: what sums over channels (B, C) or over time (A, D, bias) is written as one part for each
program, so results are the same bits in every run.

Shape legend: B batch, L length, D channels, N state size, G groups, S splits, R asked states, K steps between
saved states, T steps of a tile, C channels of a tile, P tiles of a group.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from vlmamba.ssm.backends.triton_tiles import (
    LN2,
    load,
    load_decay,
    load_start,
    load_tile,
    matrix_rows_of,
    offsets,
    place,
    position,
    resets,
    row,
    rows_of,
    segment,
    sigmoid,
    store,
    take,
    time_steps,
    walk,
    with_row,
)


class Wanted(NamedTuple):
    """Gradients that reach the states from outside; all None without any.

    `states` (B, R, D, N) float32, dense; `last` (B, L) int32: for each position the last of the asked states
    there, or -1; `chain` (B, R) int32: for each asked state the one before it at the same position, or -1;
    `count` R.
    """

    states: Any
    last: Any
    chain: Any
    count: Any


class Gradients(NamedTuple):
    """Where gradients go: dense; None where there is nothing to write.

    du, ddt, dz (B, L, D); in parts: dA (B, S, N, D), dD and dbias (B, S, D), dB and dC (P, B, L, G, N);
    initial (B, D, N).
    """

    u: Any
    dt: Any
    z: Any
    A: Any
    B: Any
    C: Any
    D: Any
    bias: Any
    initial: Any


@triton.jit
def over_channels(tile):
    """Sum (T, N, C) over channels. Turned around first: the compiler then moves the tile so that most of the sum
    is within lanes, where a sum over neighbouring lanes would exchange every element five times.
    """
    return tl.sum(tl.permute(tile, (0, 2, 1)), axis=1)


@triton.jit
def asked_of(wanted, batch, origin, columns, n, cut):
    """This row's part of `Wanted`, with pointers (N, C) to the gradients of its first asked state."""
    first = (
        wanted.states + (batch * wanted.count * cut.groups * cut.width + origin + columns[None, :]) * cut.size
    )
    return wanted.last + batch * cut.length, wanted.chain + batch * wanted.count, first + n[:, None]


@triton.jit
def walk_back(
    carry, wanted, decay, ids, asked, kept, first, cut, backwards,
    N: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Go back through one tile: from the gradient its last state gets from later to the one it passes on.

    `wanted` (T, N, C) is what y asks of each state; `asked` is of `asked_of`, or None. Returns the gradient
    passed on (N, C), and those of the states after each step (T, N, C).
    """
    gradients = tl.zeros((STEPS, N, BLOCK), tl.float32)
    if ids is not None:
        here = segment(ids, first + STEPS - 1, cut.length, cut, backwards)
    for i in tl.static_range(STEPS):
        now = row(wanted, STEPS - 1 - i, STEPS) + carry
        step = first + STEPS - 1 - i
        if asked is not None:
            inner = tl.where(step < cut.length, step, 0)
            slot = tl.load(asked[0] + position(inner, cut.length, backwards))
            slot = tl.where(step < cut.length, slot, -1)
            while slot >= 0:
                now += load(asked[2] + slot.to(tl.int64) * (cut.groups * cut.width * cut.size), kept)
                slot = tl.load(asked[1] + slot)
        gradients = with_row(gradients, STEPS - 1 - i, now, STEPS)
        carry = row(decay, STEPS - 1 - i, STEPS) * now
        if ids is not None:
            before = segment(ids, step - 1, cut.length, cut, backwards)
            carry = tl.where(here == before, carry, 0.0)
            here = before
    return carry, gradients


@triton.jit(do_not_specialize=["one"])
def local_gradients(x, strides, cut, one, dy, dy_strides, wanted, ends, sums,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """As `local_states`, for gradients: what each split passes on when nothing reaches it from later."""
    batch, split, group, _tile, origin, columns, inside = place(cut, one, BLOCK)
    backwards = (cut.reverse >> group) & 1
    total = cut.groups * cut.width
    n = tl.arange(0, N)
    real = n < cut.size
    kept = real[:, None] & inside[None, :]
    A2 = load_decay(x.A, strides.A, origin, columns, n, kept)
    dt = rows_of(x.dt, strides.dt, batch, origin, columns, backwards, STEPS)
    dy = rows_of(dy, dy_strides, batch, origin, columns, backwards, STEPS)
    C = matrix_rows_of(x.C, strides.C, batch, group, n, backwards, STEPS)
    if x.z is not None:
        z = rows_of(x.z, strides.z, batch, origin, columns, backwards, STEPS)
    if x.bias is not None:
        bias = load(x.bias + origin + columns, inside)
    ids = x.ids
    if x.ids is not None:
        ids += batch * strides.ids[0]
    asked = None
    if wanted.states is not None:
        asked = asked_of(wanted, batch, origin, columns, n, cut)
    carry = tl.zeros((N, BLOCK), tl.float32)
    elapsed = tl.zeros((BLOCK,), tl.float32)
    begin = split * cut.split_length
    count = (min(cut.length, begin + cut.split_length) - begin + STEPS - 1) // STEPS
    for i in range(count):
        first = begin + (count - 1 - i) * STEPS
        at = position(first, cut.length, backwards)
        live = first + tl.arange(0, STEPS) < cut.length
        mask = live[:, None] & inside[None, :]
        raw = take(dt, at, mask)
        if x.bias is not None:
            raw += bias[None, :]
        delta = time_steps(raw, live, SOFTPLUS)
        out = take(dy, at, mask)
        if x.z is not None:
            gate = take(z, at, mask)
            out *= gate * sigmoid(gate)
        c = take(C, at, live[:, None] & real[None, :])
        decay = tl.exp2(delta[:, None, :] * A2[None, :, :])
        wish = out[:, None, :] * c[:, :, None]
        carry, _gradients = walk_back(
            carry, wish, decay, ids, asked, kept, first, cut, backwards, N, STEPS, BLOCK
        )
        elapsed += tl.sum(delta, axis=0)
        if x.ids is not None:
            elapsed += resets(ids, first, cut, backwards, STEPS)
    part = (batch * cut.splits + split) * total
    store(ends + part * cut.size + origin + n[:, None] * total + columns[None, :], carry, kept)
    store(sums + part + origin + columns, elapsed, inside)


@triton.jit
def tile_starts(
    h, u, dt, B, bias, A2, ids, begin, cut, backwards, inside, real,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """(TILES, N, C): the state each tile of a block starts from; `h` is the one of the block."""
    starts = tl.zeros((TILES, N, BLOCK), tl.float32)
    starts = with_row(starts, 0, h, TILES)
    for j in range(TILES - 1):
        first = begin + j * STEPS
        _at, _live, _mask, _rows, value, _raw, delta, b = load_tile(
            u, dt, B, bias, first, cut.length, cut, backwards, inside, real, SOFTPLUS, STEPS
        )
        h, _before, _after, _decay = walk(
            h, delta, delta * value, b, A2, ids, first, cut.length, cut, backwards, N, STEPS, BLOCK
        )
        starts = with_row(starts, j + 1, h, TILES)
    return starts


@triton.jit
def tile_gradients(
    h, carry, inputs, delta, b, c, out, A2, ids, asked, kept, first, cut, backwards,
    N: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Go back through one tile that starts from the state `h`; `out` (T, C) is the gradient of C h.

    Returns the gradient of the state passed on (N, C); C h, the gradients of delta u and, through the decay, of
    delta (T, C); those of B and C summed over the channels (T, N); that of A summed over the steps (N, C).
    """
    _end, before, after, decay = walk(
        h, delta, inputs, b, A2, ids, first, cut.length, cut, backwards, N, STEPS, BLOCK
    )
    wish = out[:, None, :] * c[:, :, None]
    carry, g = walk_back(carry, wish, decay, ids, asked, kept, first, cut, backwards, N, STEPS, BLOCK)
    slope = g * decay * before
    d_decay = LN2 * tl.sum(slope * A2[None, :, :], axis=1)
    d_A = tl.sum(slope * delta[:, None, :], axis=0)
    d_C = over_channels(after * out[:, None, :])
    d_B = over_channels(g * inputs[:, None, :])
    y = tl.sum(after * c[:, :, None], axis=1)
    return carry, y, tl.sum(g * b[:, :, None], axis=1), d_decay, d_B, d_C, d_A


@triton.jit(do_not_specialize=["one"])
def scan_backward(x, strides, cut, one, saved, start, start_strides, dy, dy_strides, wanted, grads,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """All gradients of one tile of channels in one split of time; `start` is what reaches it from later."""
    batch, split, group, tile, origin, columns, inside = place(cut, one, BLOCK)
    backwards = (cut.reverse >> group) & 1
    total = cut.groups * cut.width
    n = tl.arange(0, N)
    real = n < cut.size
    kept = real[:, None] & inside[None, :]
    A2 = load_decay(x.A, strides.A, origin, columns, n, kept)
    u = rows_of(x.u, strides.u, batch, origin, columns, backwards, STEPS)
    dt = rows_of(x.dt, strides.dt, batch, origin, columns, backwards, STEPS)
    dy = rows_of(dy, dy_strides, batch, origin, columns, backwards, STEPS)
    B = matrix_rows_of(x.B, strides.B, batch, group, n, backwards, STEPS)
    C = matrix_rows_of(x.C, strides.C, batch, group, n, backwards, STEPS)
    answers = batch * cut.length * total + origin + offsets(columns, total, 1, backwards, STEPS)
    part = ((tile * cut.batches + batch) * cut.length * cut.groups + group) * cut.size
    parts = part + offsets(n, cut.groups * cut.size, 1, backwards, STEPS)
    if x.z is not None:
        z = rows_of(x.z, strides.z, batch, origin, columns, backwards, STEPS)
    skip = tl.zeros((BLOCK,), tl.float32)
    if x.D is not None:
        skip = load(x.D + origin + columns, inside)
    bias = None
    if x.bias is not None:
        bias = load(x.bias + origin + columns, inside)
    ids = x.ids
    if x.ids is not None:
        ids += batch * strides.ids[0]
    asked = None
    if wanted.states is not None:
        asked = asked_of(wanted, batch, origin, columns, n, cut)
    at_state = origin + n[:, None] * total + columns[None, :]
    carry = tl.zeros((N, BLOCK), tl.float32)
    if start is not None:
        carry = load_start(start, start_strides, batch, split, origin, columns, n, kept)
    sum_A = tl.zeros((N, BLOCK), tl.float32)
    sum_D, sum_bias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    TILES: tl.constexpr = KEEP // STEPS
    blocks = (cut.length + KEEP - 1) // KEEP
    begin = split * cut.split_length // KEEP
    count = min(blocks, (split + 1) * cut.split_length // KEEP) - begin
    for i in range(count):
        block = begin + count - 1 - i
        h = load(saved + (batch * blocks + block) * cut.size * total + at_state, kept)
        starts = tile_starts(
            h, u, dt, B, bias, A2, ids, block * KEEP, cut, backwards, inside, real,
            SOFTPLUS, N, TILES, BLOCK, STEPS,
        )  # fmt: skip
        for back in range(TILES):
            first = block * KEEP + (TILES - 1 - back) * STEPS
            at, live, mask, rows, value, raw, delta, b = load_tile(
                u, dt, B, bias, first, cut.length, cut, backwards, inside, real, SOFTPLUS, STEPS
            )
            d_y = take(dy, at, mask)
            out = d_y
            if x.z is not None:
                gate = take(z, at, mask)
                sigma = sigmoid(gate)
                out = d_y * gate * sigma
            carry, y, d_inputs, d_decay, d_B, d_C, d_A = tile_gradients(
                row(starts, TILES - 1 - back, TILES), carry, delta * value, delta, b, take(C, at, rows), out,
                A2, ids, asked, kept, first, cut, backwards, N, STEPS, BLOCK,
            )  # fmt: skip
            d_raw = value * d_inputs + d_decay
            if SOFTPLUS:
                d_raw *= sigmoid(raw)
            d_raw = tl.where(live[:, None], d_raw, 0.0)
            store(grads.u + at * total + answers, delta * d_inputs + skip[None, :] * out, mask)
            store(grads.dt + at * total + answers, d_raw, mask)
            if x.z is not None:
                d_gate = d_y * (y + skip[None, :] * value) * sigma * (1.0 + gate * (1.0 - sigma))
                store(grads.z + at * total + answers, d_gate, mask)
            store(grads.B + at * (cut.groups * cut.size) + parts, d_B, rows)
            store(grads.C + at * (cut.groups * cut.size) + parts, d_C, rows)
            sum_A += d_A
            sum_bias += tl.sum(d_raw, axis=0)
            sum_D += tl.sum(out * value, axis=0)
    store_sums(grads, batch, split, origin, columns, n, inside, kept, cut, sum_A, sum_D, sum_bias, carry)


@triton.jit
def store_sums(grads, batch, split, origin, columns, n, inside, kept, cut, sum_A, sum_D, sum_bias, carry):
    """Write this program's part of what sums over time, and the gradient of the initial state."""
    total = cut.groups * cut.width
    part = (batch * cut.splits + split) * total
    store(grads.A + part * cut.size + origin + n[:, None] * total + columns[None, :], sum_A, kept)
    if grads.D is not None:
        store(grads.D + part + origin + columns, sum_D, inside)
    if grads.bias is not None:
        store(grads.bias + part + origin + columns, sum_bias, inside)
    if grads.initial is not None:
        if split == 0:
            at_initial = (batch * total + origin + columns[None, :]) * cut.size + n[:, None]
            store(grads.initial + at_initial, carry, kept)
