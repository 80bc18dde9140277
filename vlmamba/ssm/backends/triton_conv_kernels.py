# mypy: allow-untyped-defs, allow-untyped-decorators
"""Triton kernels of the causal convolution.

A program owns a tile of channels of one row and a stretch of time. Time is counted in scan steps over all
tokens, history first.

Shape legend: B batch, L tokens with history, D channels, K kernel width, T steps of a tile, C channels of a
tile, P stretches of time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from vlmamba.ssm.backends.triton_tiles import load, position, sigmoid, store


class Convolution(NamedTuple):
    """A `ConvCall` as kernels see it: pointers, strides in elements, sizes; `reverse` is 0 or 1."""

    x: Any
    weight: Any
    bias: Any
    ids: Any
    x_strides: Any
    weight_strides: Any
    ids_strides: Any
    length: Any
    lead: Any
    channels: Any
    tiles: Any
    stretches: Any
    reverse: Any


@triton.jit
def place(call, BLOCK: tl.constexpr):
    """The batch row, stretch of time and channels of this program, and which of these exist."""
    program = tl.program_id(0)
    channels = program % call.tiles * BLOCK + tl.arange(0, BLOCK)
    stretch = program // call.tiles % call.stretches
    batch = (program // (call.tiles * call.stretches)).to(tl.int64)
    return batch, stretch, channels, channels < call.channels


@triton.jit
def tokens(call, batch, steps, channels, inside):
    """Inputs (T, C) at T scan steps; zero at steps that do not exist."""
    real = (steps >= 0) & (steps < call.length)
    at = position(steps, call.length, call.reverse)
    row = call.x + batch * call.x_strides[0]
    pointers = row + at[:, None] * call.x_strides[1] + channels[None, :].to(tl.int64) * call.x_strides[2]
    return load(pointers, real[:, None] & inside[None, :])


@triton.jit
def joined(call, batch, steps):
    """Whether the token at each of T scan steps is in the segment of the one before it, and both exist."""
    real = (steps >= 1) & (steps < call.length)
    result = real
    if call.ids is not None:
        row = call.ids + batch * call.ids_strides[0]
        here = position(steps, call.length, call.reverse) * call.ids_strides[1]
        there = position(steps - 1, call.length, call.reverse) * call.ids_strides[1]
        result = real & (tl.load(row + here, mask=real, other=0) == tl.load(row + there, mask=real, other=0))
    return result


@triton.jit
def tap(call, shift, channels, inside):
    """The weight (C) of the token `shift` steps ago."""
    at = channels.to(tl.int64) * call.weight_strides[0]
    return load(call.weight + at + shift * call.weight_strides[1], inside)


@triton.jit
def convolve(call, batch, steps, channels, inside, WIDTH: tl.constexpr):
    """Sums over the taps (T, C), before the activation."""
    total = tokens(call, batch, steps, channels, inside) * tap(call, WIDTH - 1, channels, inside)[None, :]
    if call.bias is not None:
        total += load(call.bias + channels, inside)[None, :]
    valid = steps >= 0
    for shift in tl.static_range(1, WIDTH):
        valid = valid & joined(call, batch, steps - (shift - 1))
        weight = tap(call, WIDTH - 1 - shift, channels, inside)
        values = tokens(call, batch, steps - shift, channels, inside)
        total += tl.where(valid[:, None], values, 0.0) * weight[None, :]
    return total


@triton.jit
def outputs(pointer, call, batch, steps, channels):
    """Pointers (T, C) to the answers at T scan steps in a dense (B, L - lead, D) tensor."""
    answers = call.length - call.lead
    at = position(steps - call.lead, answers, call.reverse)
    return pointer + (batch * answers + at[:, None]) * call.channels + channels[None, :]


@triton.jit
def conv_forward(
    call,
    y,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    REPEAT: tl.constexpr,
):
    """Fill y (B, L - lead, D)."""
    batch, stretch, channels, inside = place(call, BLOCK)
    for i in range(REPEAT):
        steps = call.lead + (stretch * REPEAT + i) * STEPS + tl.arange(0, STEPS)
        total = convolve(call, batch, steps, channels, inside, WIDTH)
        if SILU:
            total *= sigmoid(total)
        mask = (steps < call.length)[:, None] & inside[None, :]
        store(outputs(y, call, batch, steps, channels), total, mask)


@triton.jit
def conv_backward(
    call, dy, dy_strides, dx, parts,
    SILU: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, REPEAT: tl.constexpr,
):  # fmt: skip
    """Fill dx (B, L, D), and this program's part (B, P, K + 1, D) of the gradients of the taps and the bias.

    The sums before the activation are computed again.
    """
    batch, stretch, channels, inside = place(call, BLOCK)
    answers = call.length - call.lead
    dy += batch * dy_strides[0] + channels[None, :].to(tl.int64) * dy_strides[2]
    parts += (batch * call.stretches + stretch) * (WIDTH + 1) * call.channels + channels
    row = dx + batch * call.length * call.channels + channels[None, :]
    kinds = tl.arange(0, 16)
    sums = tl.zeros((16, BLOCK), tl.float32)
    for i in range(REPEAT):
        steps = (stretch * REPEAT + i) * STEPS + tl.arange(0, STEPS)
        values = tokens(call, batch, steps, channels, inside)
        total = tl.zeros((STEPS, BLOCK), tl.float32)
        valid = steps < call.length
        for shift in tl.static_range(WIDTH):
            later = steps + shift
            if shift > 0:
                valid = valid & joined(call, batch, later)
            answered = valid & (later >= call.lead) & (later < call.length)
            at = position(later - call.lead, answers, call.reverse)
            gradient = load(dy + at[:, None] * dy_strides[1], answered[:, None] & inside[None, :])
            if SILU:
                before = convolve(call, batch, later, channels, inside, WIDTH)
                sigma = sigmoid(before)
                gradient *= tl.where(answered[:, None], sigma * (1.0 + before * (1.0 - sigma)), 0.0)
            total += gradient * tap(call, WIDTH - 1 - shift, channels, inside)[None, :]
            product = tl.sum(tl.where(answered[:, None], gradient * values, 0.0), axis=0)
            sums += tl.where((kinds == WIDTH - 1 - shift)[:, None], product[None, :], 0.0)
            if shift == 0:
                sums += tl.where((kinds == WIDTH)[:, None], tl.sum(gradient, axis=0)[None, :], 0.0)
        mask = (steps < call.length)[:, None] & inside[None, :]
        store(row + position(steps, call.length, call.reverse)[:, None] * call.channels, total, mask)
    tl.store(
        parts[None, :] + kinds[:, None] * call.channels,
        sums,
        mask=(kinds <= WIDTH)[:, None] & inside[None, :],
    )
