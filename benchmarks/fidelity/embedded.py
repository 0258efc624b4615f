"""Pictures by the embedded model with its window, as `generate` draws them, timed and kept as PNG; sheets of them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

import clear_dist
from clear_dist import demo
from clear_dist.comm.group import Group
from clear_dist.families.flux.card import CARD
from clear_dist.pictures import replacing
from clear_dist.weights.loading import load_pipeline

SCENES = (5, 2, 8)
"""Held-out scenes whose captions are drawn: with trees, by the sea, at night."""
LABEL, QUALITY = 20, 76
"""Height of a sheet's labels in pixels, and JPEG's quality."""
TIMES = ("seconds", "processor_seconds")


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A picture, and what it took from prompt to pixels. Processor's seconds leave out what else the machine does."""

    picture: Image.Image
    seconds: float
    processor_seconds: float


def loaded() -> tuple[Any, Group]:
    """The pipeline on the CPU, and the group of one rank."""
    group = Group.create("cpu")
    return load_pipeline(demo.WEIGHTS, CARD, with_text_encoders=True, dtype=torch.float32, device=group.device), group


def drawn(pipe: Any, prompt: str, *, res: int, seed: int, **how: Any) -> Image.Image:
    """A square picture of `res` pixels, guided in its first stage as by the command line."""
    (picture,) = clear_dist.generate(
        pipe,
        prompt,
        height=res,
        width=res,
        negative_prompt="",
        true_cfg_scale=demo.DEFAULT_TRUE_CFG_SCALE,
        max_sequence_length=demo.DEFAULT_MAX_SEQUENCE_LENGTH,
        seed=seed,
        **how,
    )
    return picture


def kept(file: Path, draw: Callable[[], Image.Image]) -> Timed:
    """The picture of `file`, drawn unless it is there; its seconds are in the file's text."""
    if not file.exists():
        wall, processor = time.perf_counter(), time.process_time()
        picture, about = draw(), PngInfo()
        spent = time.perf_counter() - wall, time.process_time() - processor
        for name, seconds in zip(TIMES, spent, strict=True):
            about.add_text(name, f"{seconds:.6f}")
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial:
            picture.save(partial, format="png", pnginfo=about)
    with Image.open(file) as read:
        return Timed(picture=read.convert("RGB"), **{name: float(read.info[name]) for name in TIMES})


def as_bytes(*pictures: Image.Image) -> torch.Tensor:
    """[B, H, W, 3]."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))


def sheet(rows: Sequence[Sequence[tuple[str, Image.Image]]], file: Path) -> None:
    """Rows of labelled pictures of one size, pixel by pixel, as JPEG."""
    width, height = rows[0][0][1].size
    size = (max(map(len, rows)) * (width + 4), len(rows) * (height + LABEL + 4))
    whole, font = Image.new("RGB", size, "white"), ImageFont.load_default(14)
    draw = ImageDraw.Draw(whole)
    for y, row in enumerate(rows):
        for x, (label, picture) in enumerate(row):
            corner = x * (width + 4), y * (height + LABEL + 4)
            draw.text((corner[0] + 2, corner[1]), label, "black", font)
            whole.paste(picture, (corner[0], corner[1] + LABEL))
    with replacing(file) as partial:
        whole.save(partial, format="jpeg", quality=QUALITY, optimize=True)


def put_in_page(page: Path | None, name: str, text: str) -> None:
    """Replace what stands between the page's marks `<!-- name -->` and `<!-- /name -->`; no page: nothing.

    Raises ValueError for a page without them.
    """
    if page is None:
        return
    before, begin, rest = page.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not (begin and end):
        raise ValueError(f"a page must have the marks <!-- {name} --> and <!-- /{name} -->, got {page}")
    with replacing(page) as partial:
        partial.write_text(f"{before}{begin}{text}{end}{after}")
