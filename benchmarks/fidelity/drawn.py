"""The cells of ranks.py: the same prompts drawn on a number of ranks in a schedule; pictures are kept in files."""

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from clear_dist import demo
from clear_dist.demo.data import HELD_OUT_SEED
from clear_dist.demo.grammar import random_caption
from clear_dist.launch import env
from clear_dist.launch import ranks as launch
from clear_dist.pictures import replacing

PROMPTS = 32
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way to draw all prompts."""

    steps: int
    ranks: int
    text_attention: str
    """`average` or `exact`; `full` stands for full attention, whose text is exact."""
    warmup_steps: int | None = None
    """Warm-up steps of the stale schedule; None for the sync schedule."""

    @property
    def schedule(self) -> str:
        return "sync" if self.warmup_steps is None else "stale"

    @property
    def name(self) -> str:
        late = "" if self.warmup_steps is None else f"-{self.warmup_steps}"
        return f"{self.steps}-steps_{self.ranks}-ranks_{self.text_attention}_{self.schedule}{late}"

    def file_in(self, folder: Path) -> Path:
        """File of the cell's pictures."""
        return folder / f"{self.name}.npy"

    @property
    def reference(self) -> "Cell":
        """The same request on one rank, where `average` and `exact` are the same, and so are the schedules."""
        window = "full" if self.text_attention == "full" else "exact"
        return Cell(steps=self.steps, ranks=1, text_attention=window)


def planned() -> Iterator[Cell]:
    """All cells, the most telling first."""
    for steps, warmups, average_warmups in ((28, (4, 1, 2, 0, 8), (4, 1)), (12, (4, 1), ()), (50, (4,), ())):
        yield Cell(steps=steps, ranks=1, text_attention="exact")
        grid = [("average", None), ("exact", None)] if steps == 28 else [("average", None)]
        grid += [("exact", warmup) for warmup in warmups] + [("average", warmup) for warmup in average_warmups]
        for text_attention, warmup in grid:
            for ranks in (2, 4, 8):
                yield Cell(steps=steps, ranks=ranks, text_attention=text_attention, warmup_steps=warmup)
    yield Cell(steps=28, ranks=1, text_attention="full")
    for ranks in (2, 4, 8):
        yield Cell(steps=28, ranks=ranks, text_attention="full", warmup_steps=4)


def held_out_prompts() -> list[str]:
    """Captions of the first scenes that training did not see."""
    return [random_caption(np.random.default_rng(HELD_OUT_SEED + scene)) for scene in range(PROMPTS)]


def pictures_of(cell: Cell, folder: Path) -> np.ndarray:
    """The cell's pictures, bytes [prompts, H, W, 3]: read from `folder`, or drawn on real ranks."""
    file = cell.file_in(folder)
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Ranks are forked, which needs a process that has not computed yet.
        process = multiprocessing.get_context("spawn").Process(target=_launch, args=(cell, file))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)
    return np.load(file)


def _launch(cell: Cell, file: Path) -> None:
    preload = ("torch", "clear_dist.drawing.generation")
    os._exit(launch.run(partial(_draw, cell, file), nproc=cell.ranks, traceback=True, preload=preload))


def _draw(cell: Cell, file: Path) -> None:
    """The work of each rank."""
    import torch

    from clear_dist import generate, parallelize
    from clear_dist.comm.group import Group
    from clear_dist.families.flux.card import CARD
    from clear_dist.weights import loading

    torch.set_num_threads(env.read().threads or len(os.sched_getaffinity(0)))
    group = Group.create("cpu")
    pipe = loading.load_pipeline(demo.WEIGHTS, CARD, with_text_encoders=True, dtype=torch.float32, device=group.device)
    full = cell.text_attention == "full"
    parallelize(
        pipe,
        window="full" if full else demo.WINDOW,
        clear_weights=None if full else demo.CLEAR_WEIGHTS,
        text_attention="exact" if full else cell.text_attention,
        schedule=cell.schedule,
        warmup_steps=cell.warmup_steps or 0,
        group=group,
    )
    with torch.inference_mode():
        pictures = generate(
            pipe,
            held_out_prompts(),
            negative_prompt="",
            num_inference_steps=cell.steps,
            true_cfg_scale=demo.DEFAULT_TRUE_CFG_SCALE,
            max_sequence_length=demo.DEFAULT_MAX_SEQUENCE_LENGTH,
            seed=SEED,
        )
    if group.rank == 0:
        with replacing(file) as partial_file, partial_file.open("wb") as stream:
            np.save(stream, np.stack([np.asarray(picture) for picture in pictures]))
    group.close()
