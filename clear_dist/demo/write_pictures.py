"""Captioned renders in a folder, 000000.png beside 000000.txt.  python -m clear_dist.demo.write_pictures FOLDER N"""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import sys
from pathlib import Path

from PIL import Image

from clear_dist.demo.data import SIZE, TRAINING_SEED, scene
from clear_dist.demo.grammar import caption


def write_one(folder: Path, index: int) -> None:
    words, picture = scene(TRAINING_SEED + index, SIZE)
    Image.fromarray(picture).save(folder / f"{index:06}.png")
    (folder / f"{index:06}.txt").write_text(caption(words) + "\n")


def write_pictures(folder: Path, count: int) -> None:
    """Pictures that are there already, with their captions, are left as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [index for index in range(count) if not (folder / f"{index:06}.txt").exists()]
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write_one, itertools.repeat(folder), missing, chunksize=20))


if __name__ == "__main__":
    write_pictures(Path(sys.argv[1]), int(sys.argv[2]))
