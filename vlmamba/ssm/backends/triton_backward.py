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
    offsets,
    place,
    position,
    resets,
    row,
    segment,
    sigmoid,
    store,
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
    """Sum (T, N, C) over channels."""
    return tl.sum(tl.permute(tile, (0, 2, 1)), axis=1)


@triton.jit
def walk_back(
    carry, wanted, decay, ids, asked, chain, d_states, kept, total, first, cut, backwards,
    N: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Go back through one tile: from the gradient its last state gets from later to the one it passes on.

    `wanted` (T, N, C) is what y asks of each state; `asked`, `chain` and `d_states` are this row's part of
    `Wanted`, the last one as (N, C) pointers. Returns the gradient passed on (N, C), and those of the states
    after each step (T, N, C).
    """
    gradients = tl.zeros((STEPS, N, BLOCK), tl.float32)
    if ids is not None:
        here = segment(ids, first + STEPS - 1, cut.length, cut, backwards)
    for i in tl.static_range(STEPS):
        now = row(wanted, STEPS - 1 - i, STEPS) + carry
        step = first + STEPS - 1 - i
        if d_states is not None:
            inner = tl.where(step < cut.length, step, 0)
            slot = tl.load(asked + position(inner, cut.length, backwards))
            slot = tl.where(step < cut.length, slot, -1)
            while slot >= 0:
                now += load(d_states + slot.to(tl.int64) * total, kept)
                slot = tl.load(chain + slot)
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
    dt = x.dt + batch * strides.dt[0] + origin * strides.dt[2]
    C = x.C + batch * strides.C[0] + group * strides.C[2]
    dy += batch * dy_strides[0] + origin * dy_strides[2]
    at_dt = offsets(columns, strides.dt[1], strides.dt[2], backwards, STEPS)
    at_C = offsets(n, strides.C[1], strides.C[3], backwards, STEPS)
    at_dy = offsets(columns, dy_strides[1], dy_strides[2], backwards, STEPS)
    if x.z is not None:
        z = x.z + batch * strides.z[0] + origin * strides.z[2]
        at_z = offsets(columns, strides.z[1], strides.z[2], backwards, STEPS)
    if x.bias is not None:
        bias = load(x.bias + origin + columns, inside)
    ids = x.ids
    if x.ids is not None:
        ids += batch * strides.ids[0]
    asked, chain, d_states = wanted.last, wanted.chain, wanted.states
    if wanted.states is not None:
        asked += batch * cut.length
        chain += batch * wanted.count
        d_states += (batch * wanted.count * total + origin + columns[None, :]) * cut.size + n[:, None]
    carry = tl.zeros((N, BLOCK), tl.float32)
    elapsed = tl.zeros((BLOCK,), tl.float32)
    begin = split * cut.split_length
    count = (min(cut.length, begin + cut.split_length) - begin + STEPS - 1) // STEPS
    for i in range(count):
        first = begin + (count - 1 - i) * STEPS
        at = position(first, cut.length, backwards)
        live = first + tl.arange(0, STEPS) < cut.length
        mask = live[:, None] & inside[None, :]
        raw = load(dt + at * strides.dt[1] + at_dt, mask)
        c = load(C + at * strides.C[1] + at_C, live[:, None] & real[None, :])
        out = load(dy + at * dy_strides[1] + at_dy, mask)
        if x.bias is not None:
            raw += bias[None, :]
        delta = time_steps(raw, live, SOFTPLUS)
        if x.z is not None:
            gate = load(z + at * strides.z[1] + at_z, mask)
            out *= gate * sigmoid(gate)
        decay = tl.exp2(delta[:, None, :] * A2[None, :, :])
        carry, _gradients = walk_back(
            carry, out[:, None, :] * c[:, :, None], decay, ids, asked, chain, d_states, kept, total * cut.size,
            first, cut, backwards, N, STEPS, BLOCK,
        )  # fmt: skip
        elapsed += tl.sum(delta, axis=0)
        if x.ids is not None:
            elapsed += resets(ids, first, cut, backwards, STEPS)
    part = (batch * cut.splits + split) * total
    store(ends + part * cut.size + origin + n[:, None] * total + columns[None, :], carry, kept)
    store(sums + part + origin + columns, elapsed, inside)


@triton.jit(do_not_specialize=["one"])
def scan_backward(x, strides, cut, one, saved, start, start_strides, dy, dy_strides, wanted, grads,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """All gradients of one tile of channels in one split of time.

    `start` is what reaches each split from later, with the strides of (B, S, N, D).
    """
    batch, split, group, tile, origin, columns, inside = place(cut, one, BLOCK)
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
    dy += batch * dy_strides[0] + origin * dy_strides[2]
    at_u = offsets(columns, strides.u[1], strides.u[2], backwards, STEPS)
    at_dt = offsets(columns, strides.dt[1], strides.dt[2], backwards, STEPS)
    at_B = offsets(n, strides.B[1], strides.B[3], backwards, STEPS)
    at_C = offsets(n, strides.C[1], strides.C[3], backwards, STEPS)
    at_dy = offsets(columns, dy_strides[1], dy_strides[2], backwards, STEPS)
    at_out = offsets(columns, total, 1, backwards, STEPS)
    out_row = batch * cut.length * total + origin
    at_part = offsets(n, cut.groups * cut.size, 1, backwards, STEPS)
    part_row = ((tile * cut.batches + batch) * cut.length * cut.groups + group) * cut.size
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
    asked, chain, d_states = wanted.last, wanted.chain, wanted.states
    if wanted.states is not None:
        asked += batch * cut.length
        chain += batch * wanted.count
        d_states += (batch * wanted.count * total + origin + columns[None, :]) * cut.size + n[:, None]
    at_state = n[:, None] * total + columns[None, :]
    carry = tl.zeros((N, BLOCK), tl.float32)
    if start is not None:
        start += batch * start_strides[0] + split * start_strides[1] + origin * start_strides[3]
        carry = load(start + n[:, None] * start_strides[2] + columns[None, :] * start_strides[3], kept)
    sum_A = tl.zeros((N, BLOCK), tl.float32)
    sum_D = tl.zeros((BLOCK,), tl.float32)
    sum_bias = tl.zeros((BLOCK,), tl.float32)
    TILES: tl.constexpr = KEEP // STEPS
    blocks = (cut.length + KEEP - 1) // KEEP
    first_block = split * cut.split_length // KEEP
    last_block = min(blocks, (split + 1) * cut.split_length // KEEP)
    for i in range(last_block - first_block):
        block = last_block - 1 - i
        h = load(saved + (batch * blocks + block) * cut.size * total + origin + at_state, kept)
        starts = tl.zeros((TILES, N, BLOCK), tl.float32)
        starts = with_row(starts, 0, h, TILES)
        for j in range(TILES - 1):
            first = block * KEEP + j * STEPS
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
            starts = with_row(starts, j + 1, h, TILES)
        for back in range(TILES):
            j = TILES - 1 - back
            first = block * KEEP + j * STEPS
            at = position(first, cut.length, backwards)
            live = first + tl.arange(0, STEPS) < cut.length
            mask = live[:, None] & inside[None, :]
            rows = live[:, None] & real[None, :]
            value = load(u + at * strides.u[1] + at_u, mask)
            raw = load(dt + at * strides.dt[1] + at_dt, mask)
            b = load(B + at * strides.B[1] + at_B, rows)
            c = load(C + at * strides.C[1] + at_C, rows)
            out = load(dy + at * dy_strides[1] + at_dy, mask)
            if x.bias is not None:
                raw += bias[None, :]
            delta = time_steps(raw, live, SOFTPLUS)
            inputs = delta * value
            _end, before, after, decay = walk(
                row(starts, j, TILES),
                delta,
                inputs,
                b,
                A2,
                ids,
                first,
                cut.length,
                cut,
                backwards,
                N,
                STEPS,
                BLOCK,
            )
            if x.z is not None:
                gate = load(z + at * strides.z[1] + at_z, mask)
                sigma = sigmoid(gate)
                y = tl.sum(after * c[:, :, None], axis=1)
                if x.D is not None:
                    y += skip[None, :] * value
                dz = out * y * sigma * (1.0 + gate * (1.0 - sigma))
                store(grads.z + out_row + at * total + at_out, dz, mask)
                out *= gate * sigma
            carry, g = walk_back(
                carry, out[:, None, :] * c[:, :, None], decay, ids, asked, chain, d_states, kept,
                total * cut.size, first, cut, backwards, N, STEPS, BLOCK,
            )  # fmt: skip
            at_rows = part_row + at * cut.groups * cut.size + at_part
            store(grads.C + at_rows, over_channels(after * out[:, None, :]), rows)
            store(grads.B + at_rows, over_channels(g * inputs[:, None, :]), rows)
            g_b = tl.sum(g * b[:, :, None], axis=1)
            slope = g * decay * before
            sum_A += tl.sum(slope * delta[:, None, :], axis=0)
            d_raw = value * g_b + LN2 * tl.sum(slope * A2[None, :, :], axis=1)
            if SOFTPLUS:
                d_raw *= sigmoid(raw)
            d_raw = tl.where(live[:, None], d_raw, 0.0)
            d_value = delta * g_b
            if x.D is not None:
                d_value += skip[None, :] * out
            store(grads.dt + out_row + at * total + at_out, d_raw, mask)
            store(grads.u + out_row + at * total + at_out, d_value, mask)
            sum_bias += tl.sum(d_raw, axis=0)
            sum_D += tl.sum(out * value, axis=0)
    part = (batch * cut.splits + split) * total
    store(grads.A + part * cut.size + origin + at_state, sum_A, kept)
    part += origin
    if x.D is not None:
        store(grads.D + part + columns, sum_D, inside)
    if x.bias is not None:
        store(grads.bias + part + columns, sum_bias, inside)
    if grads.initial is not None:
        if split == 0:
            at_initial = (batch * total + origin + columns[None, :]) * cut.size + n[:, None]
            store(grads.initial + at_initial, carry, kept)
