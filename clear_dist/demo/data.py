"""Training data of the demo model: renders and their landscapes, kept in one folder."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import json
import os
from pathlib import Path

import numpy as np

from clear_dist.demo.grammar import Landscape, random_landscape
from clear_dist.demo.renderer import render

SIZE = 256  # pixels of the native picture; 16 pixels are one token
TRAINING_SEED, HELD_OUT_SEED, LARGE_SEED = 1_000_000, 2_000_000, 3_000_000  # scene i of a set has seed first + i
SETS = {
    "native": (TRAINING_SEED, 12000, SIZE),
    "held_out": (HELD_OUT_SEED, 96, SIZE),
    "large": (LARGE_SEED + 512, 1500, 512),
    "held_out_large": (HELD_OUT_SEED, 24, 512),
    "largest": (LARGE_SEED + 1024, 120, 1024),
}
"""Seed of the first scene, number of scenes, and pixels along a side, of each set of pictures."""
Scenes = tuple[np.ndarray, list[Landscape]]
"""Pictures, bytes [count, size, size, 3], and what they show."""


def scene(seed: int, size: int) -> tuple[Landscape, np.ndarray]:
    """Landscape of a seed and its picture, uint8 [size, size, 3]."""
    words = random_landscape(np.random.default_rng(seed))
    return words, render(words, seed, size, size)


def load_or_render(folder: Path, name: str) -> Scenes:
    """Pictures of a set of `SETS` with their landscapes; rendered once, then read from `folder`."""
    first_seed, count, size = SETS[name]
    pictures, captions = folder / f"{name}.npy", folder / f"{name}.json"
    if not captions.exists():
        folder.mkdir(parents=True, exist_ok=True)
        seeds = range(first_seed, first_seed + count)
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
            scenes = list(pool.map(scene, seeds, itertools.repeat(size), chunksize=20))
        np.save(pictures, np.stack([picture for _, picture in scenes]))
        captions.write_text(json.dumps([dataclasses.asdict(words) for words, _ in scenes]))
    return np.load(pictures), [Landscape(**words) for words in json.loads(captions.read_text())]
