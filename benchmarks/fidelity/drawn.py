"""The cells of ranks.py: prompts drawn with some weights on a number of ranks in a schedule; pictures are kept.

Weights are loaded once for each number of ranks, for all cells that are missing there.
"""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fidelity.kept import FULL, held_out_prompts
from benchmarks.lib.counts import TOKEN
from clear_dist import demo
from clear_dist.cards.clear import down_factor_of
from clear_dist.cards.headers import read_shapes
from clear_dist.geometry import most_stripes
from clear_dist.launch import env
from clear_dist.launch import ranks as launch
from clear_dist.pictures import replacing

SEED = 0
TOGETHER = 8
"""Pictures drawn at once."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way to draw all prompts."""

    weights: str
    """The name of a CLEAR file, or `full`: the model's own, with full attention, whose text is always exact."""
    steps: int
    ranks: int
    text_attention: str = "exact"
    """`average` (Eq. 7) or `exact`."""
    warmup_steps: int | None = None
    """Warm-up steps of the stale schedule; None for the sync schedule."""

    @property
    def schedule(self) -> str:
        return "sync" if self.warmup_steps is None else "stale"

    @property
    def name(self) -> str:
        late = "" if self.warmup_steps is None else f"-{self.warmup_steps}"
        return f"{self.weights}_{self.steps}-steps_{self.ranks}-ranks_{self.text_attention}_{self.schedule}{late}"

    @property
    def reference(self) -> "Cell":
        """The same request on one rank, where `average` and `exact` are the same, and so are the schedules."""
        return replace(self, ranks=1, text_attention="exact", warmup_steps=None)

    @property
    def teacher(self) -> "Cell":
        """Full attention on one rank."""
        return replace(self.reference, weights=FULL)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A model, CLEAR files distilled from it, what is drawn with them, and the folder of the cells' pictures."""

    model: Path
    files: dict[str, Path] = field(default_factory=dict)
    res: int = demo.NATIVE_SIZE
    prompts: int = 32
    folder: Path

    def file(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.npy"

    def has(self, cell: Cell) -> bool:
        return self.file(cell).exists()

    def pictures(self, cell: Cell) -> np.ndarray:
        """Bytes [prompts, H, W, 3]."""
        return np.load(self.file(cell))

    def most_ranks(self, weights: str) -> int:
        """As many as have a stripe; with down-sampled keys those are cut in whole keys."""
        side = self.res // TOKEN
        factor = 1 if weights == FULL else down_factor_of(read_shapes(self.files[weights]), self.files[weights])
        return most_stripes((side, side), cut="rows", unit=factor)

    def draw(self, cells: Sequence[Cell]) -> None:
        """Draw those that are missing, all of the same weights and number of ranks, on real ranks."""
        if all(map(self.has, cells)):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # Ranks are forked, which needs a process that has not computed yet.
        process = multiprocessing.get_context("spawn").Process(target=_launch, args=(self, tuple(cells)))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)


def planned(weights: str, steps: Sequence[int], ranks: Sequence[int], warmups: Sequence[int]) -> Iterator[list[Cell]]:
    """Cells of some weights, together those of a number of ranks; the first of all is the reference of the others."""
    for size in sorted({1, *ranks}):
        texts = ["exact"] if weights == FULL or size == 1 else ["average", "exact"]
        base = [Cell(weights=weights, steps=each, ranks=size) for each in steps]
        late = warmups if size > 1 else ()
        yield [
            cell
            for each in base
            for cell in (
                *(replace(each, text_attention=text) for text in texts),
                *(replace(each, warmup_steps=warmup) for warmup in late),
            )
        ]


def _launch(drawn: Drawn, cells: tuple[Cell, ...]) -> None:
    preload = ("torch", "clear_dist.drawing.generation")
    os._exit(launch.run(partial(_draw, drawn, cells), nproc=cells[0].ranks, traceback=True, preload=preload))


def _draw(drawn: Drawn, cells: tuple[Cell, ...]) -> None:
    """The work of each rank."""
    import torch

    from clear_dist.cards.folder import card_of
    from clear_dist.comm.group import Group
    from clear_dist.drawing.many import draw_each
    from clear_dist.families.cards import CARDS
    from clear_dist.weights import loading

    torch.set_num_threads(env.read().threads or len(os.sched_getaffinity(0)))
    group, card = Group.create("cpu"), card_of(drawn.model, CARDS)
    pipe = loading.load_pipeline(drawn.model, card, with_text_encoders=True, dtype=torch.float32, device=group.device)
    draw_each(
        len(cells),
        lambda index: _draw_cell(drawn, cells[index], pipe, group),
        group=group,
        is_there=lambda index: drawn.has(cells[index]),
        kind="cell",
    )
    group.close()


def _draw_cell(drawn: Drawn, cell: Cell, pipe: Any, group: Any) -> None:
    import torch

    from clear_dist import generate, parallelize
    from clear_dist.drawing.many import alike

    parallelized = parallelize(
        pipe,
        window="full" if cell.weights == FULL else None,
        clear_weights=drawn.files.get(cell.weights),
        text_attention=cell.text_attention,
        cut="rows",
        guidance_ranks=1,
        schedule=cell.schedule,
        warmup_steps=cell.warmup_steps or 0,
        group=group,
    )
    prompts, pictures = held_out_prompts(drawn.prompts), []
    for first in range(0, len(prompts), TOGETHER):
        with torch.inference_mode():
            pictures += generate(
                pipe,
                prompts[first : first + TOGETHER],
                height=drawn.res,
                width=drawn.res,
                cascade=False,
                negative_prompt="",
                num_inference_steps=cell.steps,
                true_cfg_scale=demo.DEFAULT_TRUE_CFG_SCALE,
                max_sequence_length=demo.DEFAULT_MAX_SEQUENCE_LENGTH,
                seed=SEED + first,
            )
    parallelized.undo()
    with alike(group):
        if group.rank == 0:
            with replacing(drawn.file(cell)) as partial_file, partial_file.open("wb") as stream:
                np.save(stream, np.stack([np.asarray(picture) for picture in pictures]))
