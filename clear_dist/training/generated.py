"""The teacher's own pictures, which CLEAR trains best on: drawn by all ranks on stripes, kept as they are finished."""

import gc
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from clear_dist.cards.folder import card_of
from clear_dist.comm.group import Group
from clear_dist.drawing.generation import generate
from clear_dist.drawing.many import draw_each
from clear_dist.families.cards import CARDS
from clear_dist.observe import peaks
from clear_dist.observe.progress import Phases
from clear_dist.options import Options, Refusal, shortened
from clear_dist.parallelize import parallelize
from clear_dist.pictures import replacing
from clear_dist.request.request import Request
from clear_dist.weights import loading


def draw_pictures(folder: Path, count: int, prompts: Sequence[str], request: Request, group: Group) -> None:
    """Draw pictures 0 ... count - 1, of each prompt in turn, with their number as the seed; what is there is kept.

    Each has beside it, written last, what it was drawn from. Raises a Refusal for one that is there and was drawn from
    something else, and on rank 0 an OSError where one cannot be written.
    """
    settings = {"model": request.model_name, "res": request.size[0], "steps": request.sampling.steps}
    wanted = {
        folder / f"{index:06}.png": {"prompt": prompts[index % len(prompts)], "seed": index, **settings}
        for index in range(count)
    }
    if group.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    held = group.broadcast_object([_held(file) for file in wanted] if group.rank == 0 else None)
    for (file, mine), found in zip(wanted.items(), held, strict=True):
        for name, value in mine.items() if found is not None else ():
            if (other := found.get(name)) != value:
                got = f"{name} {shortened(str(other))}, got {shortened(str(value))}"
                raise Refusal(f"the picture {file} was drawn with {got}; nearest: another --output")
    if None in held:
        _draw(wanted, [found is not None for found in held], request, group)
        gc.collect()
        peaks.give_back(group.device)


def _held(file: Path) -> Mapping[str, Any] | None:
    """What a picture was drawn from; None: it is not there."""
    with suppress(OSError, ValueError):
        return json.loads(file.with_suffix(".json").read_text()) if file.exists() else None
    return None


def _draw(wanted: Mapping[Path, Mapping[str, Any]], are_there: Sequence[bool], request: Request, group: Group) -> None:
    model = Path(request.model)
    pipe = loading.load_pipeline(
        model, card_of(model, CARDS), with_text_encoders=group.rank == 0, dtype=getattr(torch, request.dtype),
        device=group.device, phases=Phases(), files=request.files,
    )  # fmt: skip
    parallelize(pipe, Options(window="full", text_attention="exact"), group=group)
    sampling, (height, width) = request.sampling, request.size
    files = list(wanted)

    def draw(index: int) -> None:
        file, about = files[index], wanted[files[index]]
        with torch.inference_mode():
            pictures = generate(
                pipe, about["prompt"], height=height, width=width, seed=about["seed"], cascade=False,
                num_inference_steps=sampling.steps, guidance_scale=sampling.guidance_scale,
                negative_prompt=request.negative_prompt if sampling.passes > 1 else None,
                true_cfg_scale=sampling.true_cfg_scale, max_sequence_length=request.max_sequence_length,
            )  # fmt: skip
        for picture in pictures:
            with replacing(file) as partial:
                picture.save(partial)
            with replacing(file.with_suffix(".json")) as partial:
                partial.write_text(json.dumps(about))

    draw_each(len(files), draw, group=group, is_there=lambda index: are_there[index])
