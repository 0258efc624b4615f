"""Shapes of the renderer: signed distances to masks, ridge lines, clouds, trees. Lengths in picture heights."""

from __future__ import annotations

import dataclasses

import numpy as np

MAX_ASPECT = 4.0  # ridge features are drawn up front for pictures up to this wide, so that width alone changes nothing


def cover(distance: np.ndarray, height: int) -> np.ndarray:
    """Coverage of a pixel by the inside (distance < 0) of a shape, smoothed over one pixel."""
    return np.clip(0.5 - distance * height, 0, 1)


def soft_step(value: np.ndarray, softness: float) -> np.ndarray:
    """0 below -softness, 1 above +softness, smooth between."""
    t = np.clip(value / (2 * softness) + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def waves(x: np.ndarray, rng: np.random.Generator, length: float, octaves: int = 3) -> np.ndarray:
    """A smooth random function of x with values about in [-1, 1]."""
    total = np.zeros_like(x)
    for octave in range(octaves):
        total += np.sin(x * 2 * np.pi * 1.9**octave / length + rng.uniform(0, 2 * np.pi)) * 0.5**octave
    return total / 1.5


@dataclasses.dataclass
class Ridge:
    """A layer of land. All arrays are [1, W]: the top edge, the peak each column belongs to, wobbles."""

    top: np.ndarray
    slope: np.ndarray
    peak_x: np.ndarray
    peak_y: np.ndarray
    zigzag: np.ndarray
    lean: float  # how far the line between the lit and the shaded side runs sideways per height
    bend: float
    fade: float  # depth over which the difference between the sides is lost
    deep: float = 0.5  # how lit the land is far below its edge
    contrast: np.ndarray | float = 1.0  # 0 where two peaks meet, so that their sides do not meet in a hard line

    def lit_side(self, x: np.ndarray, y: np.ndarray, light_x: float) -> np.ndarray:
        """> 0 on the side of a peak that faces the light [H, W]."""
        depth = np.clip(y - self.peak_y, 0, None)
        line = self.peak_x + self.lean * depth + self.bend * np.sin(depth * 38)
        return (x - line) * np.where(light_x > self.peak_x, 1.0, -1.0)

    @classmethod
    def of_peaks(
        cls, x: np.ndarray, rng: np.random.Generator, low: float, spread: float, height: float, avoid: float
    ) -> Ridge:
        """Pointed mountains about `spread` apart whose feet meet near `low`; lower where `avoid` (the light) is."""
        count = int(np.ceil((MAX_ASPECT + 1) / spread))
        peak_x = (np.arange(count) + rng.uniform(0.2, 0.8, count) - 0.5) * spread
        rise = height * rng.uniform(0.55, 1.15, count)
        left, right = rng.uniform(0.55, 0.95, (2, count))
        zigzag = waves(x, rng, 0.09, 3)
        rise = rise * (1 - 0.35 * np.exp(-(((peak_x - avoid) / 0.2) ** 2)))
        offset = x - peak_x[:, None]
        tops = (low - rise)[:, None] + np.where(offset < 0, -offset * left[:, None], offset * right[:, None])
        owner, top, contrast = _nearest(tops)
        jag = 0.009 * waves(x, rng, 0.13, 3) * np.clip(np.abs(x - peak_x[owner]) * 12, 0, 1)
        return cls(
            top + jag, _slope(top, x), peak_x[owner][None], (low - rise)[owner][None], 0.02 * zigzag,
            lean=rng.uniform(-0.35, 0.35), bend=0.012, fade=0.2, contrast=contrast,
        )  # fmt: skip


def _slope(top: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.gradient(top[0], x[0])[None]


def _nearest(tops: np.ndarray, margin: float = 0.07) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From tops [peaks, W]: the highest peak's index [W], its top [1, W], and how clearly it wins [1, W]."""
    first, second = np.partition(tops, 1, axis=0)[:2]
    return tops.argmin(axis=0), first[None], np.clip((second - first) / margin, 0, 1)[None]


def hills(x: np.ndarray, rng: np.random.Generator, low: float, height: float, length: float) -> Ridge:
    top = low + height * waves(x, rng, length, 2)
    crest = np.full_like(x, low - height)
    # the lit "side" is everything near the crest: the dividing line lies far away
    return Ridge(top, _slope(top, x), np.full_like(x, -99.0), crest, 0 * x, lean=0.0, bend=0.0, fade=0.09, deep=0.1)


def dunes(x: np.ndarray, rng: np.random.Generator, low: float, spread: float) -> Ridge:
    count = int(np.ceil((MAX_ASPECT + 1) / spread)) + 1
    peak_x = (np.arange(count) + rng.uniform(0.2, 0.8, count) - 0.7) * spread
    rise = rng.uniform(0.06, 0.13, count)
    wide = spread * rng.uniform(0.35, 0.6, count)
    offset = np.abs(x - peak_x[:, None])
    tops = low - rise[:, None] * np.exp(-offset / wide[:, None])
    owner, top, contrast = _nearest(tops, 0.02)
    lean = rng.uniform(0.8, 1.6) * rng.choice([-1, 1])
    return Ridge(
        top, _slope(top, x), peak_x[owner][None], (low - rise)[owner][None], 0 * x,
        lean=lean, bend=0.02, fade=0.3, contrast=contrast,
    )  # fmt: skip


def crescent(x: np.ndarray, y: np.ndarray, centre: tuple[float, float], radius: float, height: int) -> np.ndarray:
    disc = np.hypot(x - centre[0], y - centre[1]) - radius
    bite = np.hypot(x - centre[0] - 0.5 * radius, y - centre[1] + 0.22 * radius) - 0.82 * radius
    return cover(np.maximum(disc, -bite), height)


def puffs(x: np.ndarray, y: np.ndarray, size: float, rng: np.random.Generator, height: int) -> np.ndarray:
    """Cloud with a flat base, of circles side by side [h, w]; x, y relative to the middle of the base."""
    distance = np.full(np.broadcast_shapes(x.shape, y.shape), 9.0, dtype=np.float32)
    for place in (-1.1, -0.6, -0.1, 0.4, 0.9):
        radius = size * (0.55 - 0.28 * abs(place)) * rng.uniform(0.85, 1.25)
        lift = -0.25 * radius - 0.12 * size * rng.random()
        distance = np.minimum(distance, np.hypot(x - place * size, y - lift) - radius)
    base = soft_step(0.02 * size - y, 0.012)
    return np.clip(0.5 - distance * min(height, 90), 0, 1) * base


def pine_mask(x: np.ndarray, y: np.ndarray, tall: float, height: int) -> tuple[np.ndarray, np.ndarray]:
    """A pine of five tiers with its tip at (0, 0): coverage [h, w], and the place within the tier (0 top, 1 bottom)."""
    t = np.clip(y / tall, 0, 1)
    tier = (t * 5 * 0.999) % 1
    half_width = tall * (0.05 * tier + 0.17 * t * (0.55 + 0.45 * tier))
    mask = cover((np.abs(x) - half_width) * 0.9, height) * (t > 0) * (t < 0.93)
    trunk = cover(np.abs(x) - 0.02 * tall, height) * (t >= 0.93) * (t < 1)
    return np.maximum(mask, trunk), tier * np.ones_like(x)
