"""Procedural landscapes: a `Landscape` and a seed give one scene, at any resolution, with edges smoothed over a pixel.

Lengths are in picture heights (y from 0 at the top to 1, x from 0 to width / height).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from clear_dist.demo import palette
from clear_dist.demo.grammar import Landscape
from clear_dist.demo.palette import LANDS, SKIES, mix
from clear_dist.demo.shapes import Ridge, cover, crescent, dunes, hills, pine_mask, puffs, soft_step

SUN_X: dict[str | None, float] = {"left": 0.19, "center": 0.5, "right": 0.81}
HORIZON = 0.6


@dataclasses.dataclass
class Canvas:
    """A picture being painted. y: [H, 1], x: [1, W], pixels: [H, W, 3] float32."""

    height: int
    width: int
    pixels: np.ndarray = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.y = ((np.arange(self.height, dtype=np.float32) + 0.5) / self.height)[:, None]
        self.x = ((np.arange(self.width, dtype=np.float32) + 0.5) / self.height)[None, :]
        self.aspect = self.width / self.height
        self.pixels = np.zeros((self.height, self.width, 3), dtype=np.float32)

    def window(self, left: float, right: float, top: float, bottom: float) -> tuple[slice, slice]:
        """Pixels of a box given in picture heights, clipped to the picture."""
        rows, columns = (np.array([top, bottom, left, right]) * self.height).astype(int).reshape(2, 2)
        rows, columns = np.clip(rows + [0, 1], 0, self.height), np.clip(columns + [0, 1], 0, self.width)
        return slice(*rows), slice(*columns)

    def paint(self, mask: np.ndarray, colour: np.ndarray, box: tuple[slice, slice] = (slice(None), slice(None))):
        """Blend `colour` ([3] or [h, w, 3]) over the box where `mask` [h, w] is 1."""
        region = self.pixels[box]
        region += mask[..., None] * (colour - region)


@dataclasses.dataclass
class Scene:
    words: Landscape
    rng: np.random.Generator
    sky: palette.Sky
    land: palette.Land
    light_x: float
    light_y: float
    radius: float

    def haze(self, x: np.ndarray) -> np.ndarray:
        """Colour of distant air per column [1, W, 3]: the horizon's, warmer below the light."""
        near = np.exp(-np.abs(x - self.light_x) / 0.35)[..., None]
        return mix(self.sky.horizon, self.sky.glow, 0.55 * near)


def render(words: Landscape, seed: int, height: int = 256, width: int = 256) -> np.ndarray:
    """Picture of a complete landscape, uint8 [height, width, 3]."""
    canvas = Canvas(height, width)
    scene = _scene(words, np.random.default_rng(seed), canvas.aspect)
    _paint_sky(canvas, scene)
    _paint_light(canvas, scene)
    if words.sky == "cloudy":
        _paint_clouds(canvas, scene)
    paint_land: dict[str | None, Callable[[Canvas, Scene], None]] = {
        "mountains": _paint_mountains,
        "hills": _paint_hills,
        "dunes": _paint_dunes,
        "sea": _paint_sea,
    }
    paint_land[words.land](canvas, scene)
    if words.trees:
        _paint_pines(canvas, scene)
    return (np.clip(canvas.pixels, 0, 1) * 255 + 0.5).astype(np.uint8)


def _scene(words: Landscape, rng: np.random.Generator, aspect: float) -> Scene:
    low = words.time in ("dawn", "sunset")
    light_y = rng.uniform(0.25, 0.36) if low else rng.uniform(0.15, 0.26)
    radius = rng.uniform(0.065, 0.085) if low else rng.uniform(0.055, 0.07)
    light_x = (SUN_X[words.side] + rng.uniform(-0.05, 0.05)) * aspect
    return Scene(words, rng, SKIES[words.time], LANDS[words.season], light_x, light_y, radius)


def _paint_sky(canvas: Canvas, scene: Scene) -> None:
    sky, y = scene.sky, canvas.y[..., None]
    middle_y = scene.rng.uniform(0.3, 0.36)
    upper = mix(sky.top, sky.middle, np.clip(y / middle_y, 0, 1))
    canvas.pixels[:] = mix(upper, sky.horizon, np.clip((y - middle_y) / (HORIZON - middle_y), 0, 1))
    stars = 70 if scene.words.time == "night" else 0
    stars = stars // 3 if scene.words.sky == "cloudy" else stars
    for _ in range(round(stars * canvas.aspect)):
        star_x, star_y = scene.rng.uniform(0, canvas.aspect), 0.55 * scene.rng.random()
        size, shine = scene.rng.uniform(0.0025, 0.0045), scene.rng.uniform(0.5, 1.0)
        if np.hypot(star_x - scene.light_x, star_y - scene.light_y) > 0.16:
            box = canvas.window(star_x - 0.02, star_x + 0.02, star_y - 0.02, star_y + 0.02)
            distance = np.hypot(canvas.x[:, box[1]] - star_x, canvas.y[box[0]] - star_y)
            canvas.paint(shine * np.exp(-((distance / size) ** 2)), palette.SNOW, box)


def _paint_light(canvas: Canvas, scene: Scene) -> None:
    distance = np.hypot(canvas.x - scene.light_x, canvas.y - scene.light_y)
    sun = scene.words.body == "sun"
    reach, strength = (0.20, 0.75) if sun else (0.11, 0.5)
    glow = palette.SUNS["night"] if sun and scene.words.time == "night" else scene.sky.glow
    outside = np.maximum(distance - scene.radius, 0)
    canvas.paint(strength * np.exp(-outside / reach), glow)
    if sun:
        disc = cover(distance - scene.radius, canvas.height)
        canvas.paint(disc, palette.SUNS[scene.words.time])
    else:
        mask = crescent(canvas.x, canvas.y, (scene.light_x, scene.light_y), scene.radius, canvas.height)
        canvas.paint(mask, palette.MOON)


def _paint_clouds(canvas: Canvas, scene: Scene) -> None:
    rng, sky = scene.rng, scene.sky
    for base in np.sort(rng.uniform(0.4, 0.55, 2)):
        band = np.exp(-(((canvas.y - base) / 0.022) ** 2)) * (0.6 + 0.4 * np.sin(canvas.x * 3 + rng.uniform(0, 6)))
        canvas.paint(0.6 * band, mix(sky.cloud, sky.cloud_shade, 0.3))
    count = max(3, round(rng.integers(5, 8) * canvas.aspect))
    starts = (np.arange(count) + rng.uniform(0, 1, count)) / count * canvas.aspect
    for x, y in zip(starts, np.sort(rng.uniform(0.09, 0.42, count))[rng.permutation(count)], strict=True):
        size = rng.uniform(0.10, 0.17)
        if abs(x - scene.light_x) < 1.5 * size + scene.radius and y < scene.light_y + scene.radius + 0.6 * size:
            y = scene.light_y + 0.5 * scene.radius + 0.65 * size  # the light stays visible above the cloud
        box = canvas.window(x - 2 * size, x + 2 * size, y - 1.2 * size, y + 0.4 * size)
        if canvas.pixels[box].size == 0:
            continue
        mask = puffs(canvas.x[:, box[1]] - x, canvas.y[box[0]] - y, size, rng, canvas.height)
        depth = np.clip((canvas.y[box[0]] - y + 0.55 * size) / (0.65 * size), 0, 1)[..., None]
        canvas.paint(0.92 * mask, mix(sky.cloud, sky.cloud_shade, depth), box)


def _paint_ridge(canvas: Canvas, scene: Scene, ridge: Ridge, near: float, snow: float = 0.0, rock: float = 0.0):
    """One layer of land: `near` 0 is lost in haze, 1 has its full colours; `snow` is its reach below peaks."""
    below = canvas.y - ridge.top
    first = max(0, int(ridge.top.min() * canvas.height) - 2)
    rows, below = slice(first, None), below[first:]
    y, land, light = canvas.y[rows], scene.land, scene.sky.light
    mask = cover(-below / np.sqrt(1 + ridge.slope**2), canvas.height)
    lit = soft_step(ridge.lit_side(canvas.x, y, scene.light_x), 0.006)
    lit = 0.5 + (lit - 0.5) * ridge.contrast
    lit = (lit - ridge.deep) * np.exp(-below.clip(0) / ridge.fade) + ridge.deep
    shade, bright = mix(land.shade, land.rock * 0.7, rock), mix(land.lit, land.rock * 1.3, rock)
    colour = mix(shade, bright, lit[..., None])
    if snow > 0:
        capped = soft_step(snow + ridge.zigzag - (y - ridge.peak_y), 0.006)[..., None]
        colour = mix(colour, palette.SNOW * mix(0.72, 1.0, lit)[..., None], capped)
    colour = colour * light
    mist = np.clip(1 - near + (1 - near) * 0.9 * (y - ridge.top.min()), 0, 1)[..., None]
    canvas.paint(mask, mix(colour, scene.haze(canvas.x), mist), (rows, slice(None)))


def _paint_mountains(canvas: Canvas, scene: Scene) -> None:
    rng, snow = scene.rng, scene.land.snow_line
    for near, low, spread in ((0.38, 0.46, 0.42), (0.62, 0.5, 0.5), (0.84, 0.62, 0.55)):
        ridge = Ridge.of_peaks(canvas.x, rng, low, spread, height=0.13 if near > 0.8 else 0.17, avoid=scene.light_x)
        _paint_ridge(canvas, scene, ridge, near, snow * (0.7 if near > 0.8 else 1.0), rock=0.75 - 0.35 * near)
    _paint_ridge(canvas, scene, hills(canvas.x, rng, 0.84, 0.035, 1.1), 0.97)


def _paint_hills(canvas: Canvas, scene: Scene) -> None:
    for near, low, height in ((0.5, 0.57, 0.06), (0.68, 0.64, 0.065), (0.84, 0.73, 0.06), (1.0, 0.85, 0.05)):
        _paint_ridge(canvas, scene, hills(canvas.x, scene.rng, low, height, 0.75), near)


def _paint_dunes(canvas: Canvas, scene: Scene) -> None:
    for near, low, spread in ((0.5, 0.55, 0.5), (0.7, 0.62, 0.7), (0.86, 0.72, 0.9), (1.0, 0.86, 1.1)):
        _paint_ridge(canvas, scene, dunes(canvas.x, scene.rng, low, spread), near)


def _paint_sea(canvas: Canvas, scene: Scene) -> None:
    rng, sky = scene.rng, scene.sky
    island = hills(canvas.x, rng, HORIZON + 0.005, rng.uniform(0.04, 0.07), 0.6)
    _paint_ridge(canvas, scene, island, 0.55)
    depth = np.clip((canvas.y - HORIZON) / (1 - HORIZON), 0, 1)[..., None]
    water = mix(mix(sky.horizon, sky.middle, 0.45), mix(sky.top, palette.rgb("0d4a66"), 0.45) * 0.8, depth**0.6)
    canvas.paint(cover(HORIZON - canvas.y, canvas.height) * np.ones_like(canvas.x), water)
    for step in range(14):
        y = HORIZON + 0.012 + 0.025 * step + 0.0009 * step * step
        reach = (0.05 + 0.012 * step) * rng.uniform(0.7, 1.3)
        offset = np.abs(canvas.x - scene.light_x - rng.uniform(-0.02, 0.02)) / reach
        thickness = (0.005 + 0.0007 * step) * np.sqrt(np.clip(1 - offset**2, 0, 1))
        body = palette.MOON if scene.words.body == "moon" else palette.SUNS[scene.words.time]
        canvas.paint(0.75 * cover(np.abs(canvas.y - y) - thickness, canvas.height) * (offset < 1), body)
        wave_x, wave_reach = rng.uniform(0, canvas.aspect), rng.uniform(0.06, 0.16)
        away = np.abs(canvas.x - wave_x) / wave_reach
        line = cover(np.abs(canvas.y - y - 0.012) - 0.003 * np.sqrt(np.clip(1 - away**2, 0, 1)), canvas.height)
        canvas.paint(0.35 * line * (away < 1), sky.horizon)
    _paint_ridge(canvas, scene, hills(canvas.x, rng, 0.9, 0.05, 0.9), 1.0)


def _paint_pines(canvas: Canvas, scene: Scene) -> None:
    rng, light = scene.rng, scene.sky.light
    count = max(3, round(rng.integers(7, 11) * canvas.aspect))
    places = (np.arange(count) + rng.uniform(0.1, 0.9, count)) / count
    for place in places[rng.permutation(count)]:
        edge = abs(2 * place - 1)
        tall = rng.uniform(0.16, 0.24) + 0.2 * edge * rng.uniform(0.6, 1.0)
        x, foot = place * canvas.aspect, rng.uniform(0.93, 1.03)
        box = canvas.window(x - 0.3 * tall, x + 0.3 * tall, foot - tall - 0.01, foot + 0.01)
        mask, tier = pine_mask(canvas.x[:, box[1]] - x, canvas.y[box[0]] - foot + tall, tall, canvas.height)
        colour = scene.land.pine * mix(light, 1.0, 0.35)
        side = soft_step((canvas.x[:, box[1]] - x) * np.sign(scene.light_x - x), 0.02)[..., None]
        colour = mix(colour, colour * 1.7 + 0.03, side * np.ones_like(mask)[..., None])
        if scene.words.season == "snowy":
            colour = mix(colour, palette.SNOW * light, 0.85 * soft_step(0.38 - tier, 0.05)[..., None])
        canvas.paint(mask, colour, box)
