"""Scenes of handwritten digits: what they contain and how they are drawn.

A scene is a 96 x 96 picture with one to four handwritten digits (scikit-learn's ``load_digits``, real pen
strokes, 8 x 8), each in a cell of a 2 x 2 layout, in one of eight colours, over a plain, graded, noisy or
striped background. The digit samples are split once (``digit_pools``): training scenes and held-out scenes
never share a sample.

Shapes: S picture side (96), G glyph side after upsampling (32), h w the box a digit is drawn into.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.random import Generator

SIDE = 96
CELL = SIDE // 2
GLYPH = 32
NUM_TRAIN = 1400  # of 1,797 samples; the other 397 are held out
SPLIT_SEED = 20240321  # the split is part of the task: it does not follow --seed

PLACES = ("top left", "top right", "bottom left", "bottom right")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.08, 0.08),
    "orange": (0.99, 0.52, 0.02),
    "yellow": (0.98, 0.92, 0.10),
    "green": (0.08, 0.62, 0.14),
    "blue": (0.08, 0.20, 0.92),
    "purple": (0.55, 0.10, 0.68),
    "white": (0.98, 0.98, 0.98),
    "black": (0.03, 0.03, 0.03),
}
BACKGROUNDS = ("plain", "gradient", "noise", "stripes")
MIN_CONTRAST = 0.45  # RGB distance between a digit and the background, of at most sqrt(3)


@dataclass(frozen=True)
class Digit:
    """One digit of a scene: its value, the sample it is drawn from, and how it is drawn."""

    value: int
    sample: int
    colour: str
    cell: int
    x: float
    y: float
    size: float
    angle: float
    rgb: tuple[float, float, float]

    @property
    def place(self) -> str:
        """The name of the cell, e.g. ``"top left"``."""
        return PLACES[self.cell]


@dataclass(frozen=True)
class Background:
    """What lies behind the digits; ``first`` and ``second`` are RGB in 0..1."""

    kind: str
    first: tuple[float, float, float]
    second: tuple[float, float, float]
    angle: float
    period: float
    seed: int


@dataclass(frozen=True)
class Scene:
    """A background and one to four digits, in reading order."""

    background: Background
    digits: tuple[Digit, ...]

    def to_dict(self) -> dict:
        """The scene as plain JSON values (the ground truth of held-out pictures)."""
        return asdict(self)


@functools.lru_cache(maxsize=1)
def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images.astype(np.float32) / 16.0, data.target.astype(np.int64)


@functools.lru_cache(maxsize=1)
def digit_pools() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sample indices of ``load_digits`` (training, held out): a fixed, stratified, disjoint 1,400 / 397."""
    _, labels = _load_digits()
    rng = np.random.default_rng(SPLIT_SEED)
    held: list[int] = []
    num_held = len(labels) - NUM_TRAIN
    for value in range(10):
        indices = rng.permutation(np.flatnonzero(labels == value))
        share = num_held * (value + 1) // 10 - num_held * value // 10
        held.extend(int(i) for i in indices[:share])
    train = sorted(set(range(len(labels))) - set(held))
    assert len(train) == NUM_TRAIN
    assert not set(train) & set(held)
    return tuple(train), tuple(sorted(held))


def label_of(sample: int) -> int:
    """The value that was written, for one index of ``load_digits``."""
    return int(_load_digits()[1][sample])


@functools.lru_cache(maxsize=8)
def by_value(pool: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The samples of a pool, grouped by the digit's value 0..9."""
    labels = _load_digits()[1]
    return tuple(tuple(i for i in pool if labels[i] == value) for value in range(10))


@functools.lru_cache(maxsize=2048)
def glyph(sample: int) -> np.ndarray:
    """One digit sample as ink coverage, (G, G) float32 in 0..1, upsampled and framed by empty pixels."""
    from PIL import Image

    framed = np.pad(_load_digits()[0][sample], 1)
    big = np.asarray(Image.fromarray(framed).resize((GLYPH, GLYPH), Image.Resampling.BICUBIC))
    return np.clip(big, 0.0, 1.0)


def _rgb(values: np.ndarray) -> tuple[float, float, float]:
    r, g, b = (round(float(v), 3) for v in np.clip(values, 0.0, 1.0))
    return (r, g, b)


def sample_background(rng: Generator) -> Background:
    """A background at random: greyish or faintly tinted, so that every colour of digit has room."""
    kind = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    first = rng.uniform(0.05, 0.95) + rng.uniform(-0.13, 0.13, 3)
    second = first + rng.uniform(-0.22, 0.22) + rng.uniform(-0.06, 0.06, 3)
    return Background(
        kind=kind,
        first=_rgb(first),
        second=_rgb(second),
        angle=round(float(rng.uniform(0, 2 * np.pi)), 3),
        period=round(float(rng.uniform(6, 20)), 2),
        seed=int(rng.integers(2**31)),
    )


def _colours_for(background: Background) -> list[str]:
    grounds = [np.array(background.first), np.array(background.second)]
    return [
        name
        for name, rgb in COLOURS.items()
        if min(float(np.linalg.norm(np.array(rgb) - ground)) for ground in grounds) >= MIN_CONTRAST
    ]


def sample_scene(rng: Generator, pool: tuple[int, ...], num_digits: int | None = None) -> Scene:
    """A scene at random, its digits drawn from the samples in ``pool`` (1 to 4 of them unless told)."""
    count = int(rng.integers(1, 5)) if num_digits is None else num_digits
    while True:
        background = sample_background(rng)
        allowed = _colours_for(background)
        if len(allowed) >= 5:
            break
    cells = sorted(int(c) for c in rng.permutation(4)[:count])
    repeats = rng.random() < 0.2
    colours = rng.choice(len(allowed), size=count, replace=repeats)
    digits = []
    for cell, colour_index in zip(cells, colours, strict=True):
        value = int(rng.integers(10))
        samples = by_value(pool)[value]
        size = float(rng.uniform(32, 46))
        room = (CELL - size) / 2 + 1.0
        dx, dy = rng.uniform(-room, room, 2)
        name = allowed[int(colour_index)]
        digits.append(
            Digit(
                value=value,
                sample=samples[int(rng.integers(len(samples)))],
                colour=name,
                cell=cell,
                x=round(CELL * (cell % 2) + CELL / 2 + float(dx), 2),
                y=round(CELL * (cell // 2) + CELL / 2 + float(dy), 2),
                size=round(size, 2),
                angle=round(float(rng.uniform(-10, 10)), 2),
                rgb=_rgb(np.array(COLOURS[name]) + rng.uniform(-0.05, 0.05, 3)),
            )
        )
    return Scene(background, tuple(digits))


@functools.lru_cache(maxsize=1)
def _axes() -> tuple[np.ndarray, np.ndarray]:
    axis = np.arange(SIDE, dtype=np.float32) + 0.5
    return axis[None, :], axis[:, None]


def draw_background(background: Background) -> np.ndarray:
    """The empty picture, (S, S, 3) float32 in 0..1."""
    first = np.array(background.first, np.float32)
    second = np.array(background.second, np.float32)
    if background.kind == "plain":
        return np.broadcast_to(first, (SIDE, SIDE, 3)).copy()
    x, y = _axes()
    along = np.float32(np.cos(background.angle)) * x + np.float32(np.sin(background.angle)) * y
    if background.kind == "gradient":
        low, high = along.min(), along.max()
        weight = (along - low) / (high - low)
    elif background.kind == "stripes":
        weight = 0.5 + 0.5 * np.sin(along * np.float32(2 * np.pi / background.period))
    else:  # fine grain over a coarse one
        rng = np.random.default_rng(background.seed)
        coarse = np.kron(rng.random((SIDE // 6, SIDE // 6), dtype=np.float32), np.ones((6, 6), np.float32))
        weight = 0.5 * coarse + 0.5 * rng.random((SIDE, SIDE), dtype=np.float32)
    return first + weight[..., None] * (second - first)


def _ink(digit: Digit, warp: Generator | None) -> tuple[slice, slice, np.ndarray]:
    """Where a digit lies and its ink coverage there, (h, w); ``warp`` bends, shears and thickens it."""
    half = digit.size * 0.6
    left, top = max(int(digit.x - half), 0), max(int(digit.y - half), 0)
    right, bottom = min(int(digit.x + half) + 1, SIDE), min(int(digit.y + half) + 1, SIDE)
    u = (np.arange(left, right, dtype=np.float32) + 0.5 - np.float32(digit.x))[None, :]
    v = (np.arange(top, bottom, dtype=np.float32) + 0.5 - np.float32(digit.y))[:, None]
    angle, scale = np.deg2rad(digit.angle), GLYPH / digit.size
    matrix = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    threshold, softness = 0.24, 0.45
    if warp is not None:
        shear = np.array([[1.0, warp.uniform(-0.25, 0.25)], [warp.uniform(-0.12, 0.12), 1.0]])
        turn = np.deg2rad(warp.uniform(-10, 10))
        turned = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        matrix = turned @ shear @ matrix * np.exp(warp.uniform(-0.14, 0.14, (2, 1)))
        threshold, softness = warp.uniform(0.12, 0.36), warp.uniform(0.3, 0.6)
    matrix = matrix.astype(np.float32)
    gx = matrix[0, 0] * u + matrix[0, 1] * v
    gy = matrix[1, 0] * u + matrix[1, 1] * v
    if warp is not None:
        for _ in range(2):
            a, b, c, d, p, q = warp.uniform(-1, 1, 6).astype(np.float32)
            ex = 1.3 * np.sin(0.22 * (a * gx + b * gy) + np.pi * p)
            gy = gy + 1.3 * np.sin(0.22 * (c * gx + d * gy) + np.pi * q)
            gx = gx + ex
    image = glyph(digit.sample)
    gx = np.clip(gx + (GLYPH / 2 - 0.5), 0, GLYPH - 1.001)
    gy = np.clip(gy + (GLYPH / 2 - 0.5), 0, GLYPH - 1.001)
    ix, iy = gx.astype(np.int32), gy.astype(np.int32)
    fx, fy = gx - ix, gy - iy
    flat, base = image.ravel(), iy * GLYPH + ix
    upper = flat[base] * (1 - fx) + flat[base + 1] * fx
    lower = flat[base + GLYPH] * (1 - fx) + flat[base + GLYPH + 1] * fx
    ink = upper * (1 - fy) + lower * fy
    return slice(top, bottom), slice(left, right), np.clip((ink - threshold) / softness, 0.0, 1.0)


def draw(scene: Scene, warp: Generator | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene.

    Args:
        scene: what to draw.
        warp: a random generator bends every digit a little (augmentation for the encoder's pre-training
        only).

    Returns:
        The picture, (S, S, 3) uint8, and where the ink is, (S, S) float32 in 0..1.
    """
    picture = draw_background(scene.background)
    plane = np.zeros((SIDE, SIDE), np.float32)
    for digit in scene.digits:
        rows, columns, ink = _ink(digit, warp)
        area = picture[rows, columns]
        area += ink[..., None] * (np.array(digit.rgb, np.float32) - area)
        np.maximum(plane[rows, columns], ink, out=plane[rows, columns])
    return (np.clip(picture, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8), plane


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene, (S, S, 3) uint8."""
    return draw(scene)[0]


def samples_of(scenes: Sequence[Scene]) -> set[int]:
    """Every digit sample that the scenes use."""
    return {digit.sample for scene in scenes for digit in scene.digits}
