"""Colours of the demo's landscapes: skies by time of day, lands by season. RGB in [0, 1]."""

from __future__ import annotations

import dataclasses

import numpy as np

Colour = np.ndarray  # [3] float32


@dataclasses.dataclass(frozen=True)
class Sky:
    """Gradient stops from the zenith to the horizon, the light's tint, and what shines."""

    top: Colour
    middle: Colour
    horizon: Colour
    light: Colour
    glow: Colour
    cloud: Colour
    cloud_shade: Colour


@dataclasses.dataclass(frozen=True)
class Land:
    """A land's shaded and lit sides, its rock, and how far snow reaches down from a peak (in picture heights)."""

    shade: Colour
    lit: Colour
    rock: Colour
    snow_line: float
    pine: Colour


def rgb(text: str) -> Colour:
    """'8fb3e0' to an array [3]."""
    return np.array([int(text[i : i + 2], 16) / 255 for i in (0, 2, 4)], dtype=np.float32)


def mix(first: Colour | float, second: Colour | float, amount: float | np.ndarray) -> np.ndarray:
    """Linear mixture, at `amount` 1 all `second`."""
    return np.asarray(first + (second - first) * amount)


SKIES: dict[str | None, Sky] = {
    "dawn": Sky(*map(rgb, ("6f8fcb", "e3a9c4", "ffe3bd", "d9bccb", "ffe0b0", "ffe9ea", "c69dbd"))),
    "noon": Sky(*map(rgb, ("2a78d6", "6fb4f0", "d8eefb", "ffffff", "fff6d2", "ffffff", "c2d3e6"))),
    "sunset": Sky(*map(rgb, ("3d2a72", "cf4a68", "ffab4a", "d08a78", "ffb850", "ff9a72", "8a3f72"))),
    "night": Sky(*map(rgb, ("060a1f", "101d48", "27427a", "5866a0", "6f8fd0", "4a5c92", "1d2850"))),
}
LANDS: dict[str | None, Land] = {
    "green": Land(rgb("2c6b3f"), rgb("86bd4e"), rgb("5f7d78"), 0.05, rgb("12382c")),
    "autumn": Land(rgb("97441f"), rgb("eda13a"), rgb("8d6658"), 0.04, rgb("4a2418")),
    "snowy": Land(rgb("9db6da"), rgb("ffffff"), rgb("6d83a8"), 0.17, rgb("1d3a4a")),
    "desert": Land(rgb("b5703c"), rgb("f6cd84"), rgb("a9644a"), 0.0, rgb("4d4a26")),
}
SNOW = rgb("fbfdff")
SUNS: dict[str | None, Colour] = {
    "dawn": rgb("fff3cf"), "noon": rgb("fffbe0"), "sunset": rgb("ffe08a"), "night": rgb("ff9a5c"),
}  # fmt: skip
MOON = rgb("f2f1e4")
