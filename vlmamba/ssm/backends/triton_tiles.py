# mypy: allow-untyped-defs, allow-untyped-decorators
"""Device functions shared by the Triton kernels of the selective scan.

A program owns a tile of channels of one group and walks through time in tiles of T steps. Its tensors are
(T, C) for what every channel has, (T, N) for B and C, and (T, N, C) for the states, channels last: neighbouring
lanes are neighbouring channels, loads are coalesced, and time and states lie in the registers of a lane, so
that the recurrence and sums over N need no exchange between lanes.

Only what both the compiler and Triton's interpreter know is used, and no libdevice.

Shape legend: B batch, L length, D channels, N state size, G groups, S splits, T steps of a tile, C channels of
a tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Inputs(NamedTuple):
    """The tensors of a `ScanCall`; those it does not have are None."""

    u: Any
    dt: Any
    z: Any
    A: Any
    B: Any
    C: Any
    D: Any
    bias: Any
    ids: Any


class Strides(NamedTuple):
    """The strides of those that may be views, in elements."""

    u: Any
    dt: Any
    z: Any
    A: Any
    B: Any
    C: Any
    ids: Any


class Cut(NamedTuple):
    """How a call is cut: `tiles` of channels of each of `groups` of `width` channels; `splits` of time.

    Bit g of `reverse` says that group g runs backwards; `size` is N; `batches` is B.
    """

    batches: int
    length: int
    width: int
    tiles: int
    groups: int
    splits: int
    split_length: int
    reverse: int
    size: int


@triton.jit
def place(cut, one, BLOCK: tl.constexpr):
    """Which part of a call this program has.

    Returns its batch row, split of time, group, tile of the group, first channel, the offsets of its channels
    from there, and which of them exist. `one` is 1, but the compiler must not know: if it knew that channels
    are neighbours in memory it would give each lane several of them in loads and stores, and shuffle tiles
    between that layout and the one of the recurrence at every step.
    """
    program = tl.program_id(0)
    tile = program % cut.tiles
    group = program // cut.tiles % cut.groups
    split = program // (cut.tiles * cut.groups) % cut.splits
    batch = (program // (cut.tiles * cut.groups * cut.splits)).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    first = (group * cut.width + tile * BLOCK).to(tl.int64)
    return batch, split, group, tile, first, columns * one, tile * BLOCK + columns < cut.width


@triton.jit
def position(step, length, backwards):
    """Where in memory a scan step is."""
    return tl.where(backwards != 0, length - 1 - step, step).to(tl.int64)


@triton.jit
def offsets(columns, row_stride, column_stride, backwards, STEPS: tl.constexpr):
    """(T, C) offsets within a tile from its first step and column: the same for every tile of a program."""
    rows = tl.arange(0, STEPS) * tl.where(backwards != 0, -row_stride, row_stride)
    return rows[:, None] + (columns * column_stride)[None, :]


@triton.jit
def load(pointers, mask):
    """Float32 values, zero where the mask is false."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(pointers, values, mask):
    """Write values, rounded to what the pointers hold."""
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def rows_of(pointer, strides, batch, origin, columns, backwards, STEPS: tl.constexpr):
    """This program's part of a (B, L, D) tensor, for `take`."""
    begin = pointer + batch * strides[0] + origin * strides[2]
    return begin, offsets(columns, strides[1], strides[2], backwards, STEPS), strides[1]


@triton.jit
def matrix_rows_of(pointer, strides, batch, group, n, backwards, STEPS: tl.constexpr):
    """This program's part of a (B, L, G, N) tensor, for `take`."""
    begin = pointer + batch * strides[0] + group * strides[2]
    return begin, offsets(n, strides[1], strides[3], backwards, STEPS), strides[1]


@triton.jit
def take(rows, at, mask):
    """The tile (T, C) or (T, N) at a position."""
    return load(rows[0] + at * rows[2] + rows[1], mask)


@triton.jit
def load_tile(
    u, dt, B, bias, first, limit, cut, backwards, inside, real, SOFTPLUS: tl.constexpr, STEPS: tl.constexpr
):
    """What the recurrence needs of the tile at scan step `first`; nothing exists from `limit` on.

    Returns its position, which of its steps exist (T), the masks (T, C) and (T, N), u, dt + bias and delta
    (T, C), and B (T, N).
    """
    at = position(first, cut.length, backwards)
    live = first + tl.arange(0, STEPS) < limit
    mask = live[:, None] & inside[None, :]
    rows = live[:, None] & real[None, :]
    raw = take(dt, at, mask)
    if bias is not None:
        raw += bias[None, :]
    return at, live, mask, rows, take(u, at, mask), raw, time_steps(raw, live, SOFTPLUS), take(B, at, rows)


@triton.jit
def load_decay(A, strides, first, columns, n, kept):
    """A / ln 2 as (N, C), so that decays are powers of two."""
    return (
        load(A + first * strides[0] + columns[None, :] * strides[0] + n[:, None] * strides[1], kept) * LOG2E
    )


@triton.jit
def load_start(start, strides, batch, split, origin, columns, n, kept):
    """What a split starts from, (N, C), out of a tensor with the strides of (B, S, N, D)."""
    begin = start + batch * strides[0] + split * strides[1] + origin * strides[3]
    return load(begin + n[:, None] * strides[2] + columns[None, :] * strides[3], kept)


@triton.jit
def row(tile, t, STEPS: tl.constexpr):
    """Row t of a (T, N, C) tile. All but one term are -0.0, which the compiler knows to add nothing."""
    here = (tl.arange(0, STEPS) == t)[:, None, None]
    return tl.sum(tl.where(here, tile, -0.0), axis=0)


@triton.jit
def with_row(tile, t, values, STEPS: tl.constexpr):
    """The (T, N, C) tile with row t replaced."""
    here = (tl.arange(0, STEPS) == t)[:, None, None]
    return tl.where(here, values[None, :, :], tile)


@triton.jit
def exp(x):
    """The exponential."""
    return tl.exp2(x * LOG2E)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), for all x."""
    return 1.0 / (1.0 + exp(-x))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to full relative precision, also for very negative x.

    log(1 + e) = 2 atanh(s) with s = e / (2 + e), and atanh(s) / s is a polynomial in s^2 (Chebyshev fit over
    [0, 1/9], relative error 4e-9).
    """
    e = exp(-tl.abs(x))
    s = e / (2.0 + e)
    w = s * s
    p = 0.28174657 * w + 0.27961419
    p = p * w + 0.40024854
    p = p * w + 0.66666316
    p = p * w + 2.0
    return tl.maximum(x, 0.0) + s * p


@triton.jit
def time_steps(raw, live, SOFTPLUS: tl.constexpr):
    """The time steps (T, C) from dt + bias; 0, which changes no state, at steps that do not exist."""
    delta = raw
    if SOFTPLUS:
        delta = softplus(raw)
    return tl.where(live[:, None], delta, 0.0)


@triton.jit
def segment(ids, step, limit, cut, backwards):
    """The segment id of a scan step; steps before the first and from `limit` on are in their neighbour's."""
    return tl.load(ids + position(tl.maximum(tl.minimum(step, limit - 1), 0), cut.length, backwards))


@triton.jit
def resets(ids, first, cut, backwards, STEPS: tl.constexpr):
    """Infinity when a segment starts in a tile, else 0."""
    total = 0.0
    before = segment(ids, first - 1, cut.length, cut, backwards)
    for t in tl.static_range(STEPS):
        here = segment(ids, first + t, cut.length, cut, backwards)
        total += tl.where(here == before, 0.0, float("inf"))
        before = here
    return total


@triton.jit
def walk(
    h, delta, inputs, b, A2, ids, first, limit, cut, backwards,
    N: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Run the recurrence over one tile that starts at scan step `first`.

    `h` (N, C) is the state before it, `delta` and `inputs` = delta u are (T, C), `b` (T, N), `A2` (N, C) as of
    `load_decay`, `ids` the row of seq_idx or None; nothing changes from scan step `limit` on.

    Returns the state after it (N, C), the states before and after each step (T, N, C) and the decays (T, N, C).
    """
    decay = tl.exp2(delta[:, None, :] * A2[None, :, :])
    increment = inputs[:, None, :] * b[:, :, None]
    before = tl.zeros((STEPS, N, BLOCK), tl.float32)
    after = tl.zeros((STEPS, N, BLOCK), tl.float32)
    if ids is not None:
        last = segment(ids, first - 1, limit, cut, backwards)
    for t in tl.static_range(STEPS):
        if ids is not None:
            here = segment(ids, first + t, limit, cut, backwards)
            h = tl.where(here == last, h, 0.0)
            last = here
        before = with_row(before, t, h, STEPS)
        h = row(decay, t, STEPS) * h + row(increment, t, STEPS)
        after = with_row(after, t, h, STEPS)
    return h, before, after, decay
