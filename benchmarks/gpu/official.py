"""CLEAR's published way on one GPU beside ours, with real weights: the same pictures from the same noise.

    python -m benchmarks.gpu.official --model FOLDER --clear-weights FILE --folder FOLDER --sides 1024 2048

The published way is diffusers' own pipeline with CLEAR's weights, tokens row by row and one compiled FlexAttention a
layer (lib/row_major.py). Ours is the same pipeline after `parallelize`, on one rank. Seconds of a step are medians
without the first one, which compiles. Latents differ by rounding.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.checks import relative_error
from benchmarks.gpu.ready import chosen, in_one_line, weights_parser
from benchmarks.gpu.session import shown
from benchmarks.gpu.speed import on_row_major
from benchmarks.lib.flags import pixels, whole_number
from benchmarks.lib.machine import machine, save
from benchmarks.lib.steps import synchronize
from clear_dist import hub, parallelize
from clear_dist.cards.clear import radius_of
from clear_dist.cards.folder import card_of
from clear_dist.comm.group import Group
from clear_dist.commands.prepare import encode_ahead
from clear_dist.families.cards import CARDS
from clear_dist.observe.peaks import peak_memory, reset_peak_memory
from clear_dist.observe.progress import Phases
from clear_dist.options import Refusal
from clear_dist.request.request import Request
from clear_dist.weights.loading import load_pipeline

PROMPT = "a lighthouse on a rocky coast at dusk, waves, a small boat, photograph"
Prepare = Callable[[], AbstractContextManager[Any]]


def main() -> None:
    parser = weights_parser(__doc__)
    parser.add_argument("--sides", type=pixels, nargs="+", default=[1024, 2048], help="of square pictures, in pixels")
    parser.add_argument("--steps", type=whole_number, default=20)
    in_one_line(partial(measure, parser.parse_args()))


def measure(options: argparse.Namespace) -> None:
    device = torch.device("cuda")
    group = Group.create(device)
    request = hub.locate(chosen(options), group, CARDS, local_rank=0)
    if request.clear_weights is None or request.down_factor > 1:
        raise Refusal("--clear-weights must be a checkpoint without down-sampled keys; nearest: clear_local_16")
    radius = radius_of(request.clear_weights)
    assert radius is not None, "the request's window is the checkpoint's"
    pipe, embeddings = load(request, device)
    draw = partial(drawn, embeddings=embeddings, steps=options.steps)
    rows: list[dict[str, Any]] = []
    for side in options.sides:
        # Ours first: `undo` leaves CLEAR's weights where they are.
        ways: dict[str, Prepare] = {
            "ours": partial(on_stripes, pipe, request.clear_weights, group),
            "official": partial(on_row_major, pipe, side, embeddings[0].shape[1], radius),
        }
        rows.append(beside(ways, side, draw, options.folder))
        save({"machine": machine(device), "radius": radius, "rows": rows}, options.folder / "official.json")
        print(*(f"{name}={shown(value)}" for name, value in rows[-1].items()), flush=True)
    group.close()


def load(request: Request, device: torch.device) -> tuple[Any, list[Tensor]]:
    """The pipeline without text encoders, and the prompt's embeddings, which they made before it came."""
    card, phases = card_of(Path(request.model), CARDS), Phases()
    (encoded,) = encode_ahead(request, card, device, phases)
    dtype = getattr(torch, request.dtype)
    pipe = load_pipeline(Path(request.model), card, with_text_encoders=False, dtype=dtype, device=device)
    return pipe, [tensor.to(device) for tensor in encoded if tensor is not None]


@contextmanager
def on_stripes(pipe: Any, clear_weights: str, group: Group) -> Iterator[Any]:
    handle = parallelize(pipe, clear_weights=clear_weights, group=group, text_attention="exact")
    try:
        yield pipe
    finally:
        handle.undo()


def beside(ways: dict[str, Prepare], side: int, draw: Callable[..., Any], folder: Path) -> dict[str, Any]:
    """A row of figures for both ways; the pictures are saved."""
    row: dict[str, Any] = {"side_px": side}
    latents: dict[str, Tensor] = {}
    for name, prepare in ways.items():
        try:
            with prepare() as pipe:
                latents[name], picture, figures = draw(pipe, side)
        except torch.OutOfMemoryError:
            row[name] = "out of memory"
            torch.cuda.empty_cache()
        else:
            row[name] = figures
            picture.save(folder / f"{name}-{side}.png")
    if len(latents) == len(ways):
        row["times_as_fast"] = row["official"]["seconds_per_step"] / row["ours"]["seconds_per_step"]
        row["relative_difference"] = relative_error(latents["ours"], latents["official"])
    return row


def drawn(pipe: Any, side: int, *, embeddings: list[Tensor], steps: int) -> tuple[Tensor, Any, dict[str, Any]]:
    """Latents, picture and figures."""
    device, ends, last = embeddings[0].device, [], []

    def end_step(pipeline: Any, step: int, _: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        synchronize(device)
        ends.append(time.perf_counter())
        last[:] = [tensors["latents"]]
        return {}

    reset_peak_memory(device)
    began = time.perf_counter()
    picture = pipe(
        prompt_embeds=embeddings[0],
        pooled_prompt_embeds=embeddings[1],
        height=side,
        width=side,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=end_step,
    ).images[0]
    seconds = [later - earlier for earlier, later in pairwise(ends)]
    figures = {
        "seconds_per_step": median(seconds),
        "seconds": time.perf_counter() - began,
        "first_step": ends[0] - began,
        "peak_bytes": peak_memory(device),
    }
    return last[0], picture, figures


if __name__ == "__main__":
    main()
