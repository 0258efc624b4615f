"""The teacher's own pictures, which CLEAR trains best on: drawn by all ranks on stripes, kept as they are finished."""

import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from clear_dist.cards.folder import card_of
from clear_dist.comm.group import Group
from clear_dist.drawing.generation import generate
from clear_dist.drawing.many import alike, draw_each
from clear_dist.families.cards import CARDS
from clear_dist.launch.ends import Failure
from clear_dist.observe import peaks
from clear_dist.observe.progress import Phases
from clear_dist.options import Options
from clear_dist.parallelize import parallelize
from clear_dist.pictures import replacing
from clear_dist.request.request import Request
from clear_dist.weights import loading


def draw_pictures(folder: Path, count: int, prompts: Sequence[str], request: Request, group: Group) -> None:
    """Draw pictures 0 ... count - 1, of each prompt in turn, with their number as the seed; what is there is kept.

    Each has its prompt beside it, written last. Raises a Failure where some could not be written.
    """
    files = [folder / f"{index:06}.png" for index in range(count)]
    if group.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    if group.agree(group.rank == 0 and not all(map(_is_there, files))):
        failed = _drawn(files, prompts, request, group)
        gc.collect()
        peaks.give_back(group.device)
        for index, why in failed.items():
            raise Failure(f"{len(failed)} pictures could not be drawn, {files[index]} first: {why}; run it again")


def _drawn(files: Sequence[Path], prompts: Sequence[str], request: Request, group: Group) -> Mapping[int, str]:
    """Why some could not be, by their index."""
    model = Path(request.model)
    pipe = loading.load_pipeline(
        model, card_of(model, CARDS), with_text_encoders=group.rank == 0, dtype=getattr(torch, request.dtype),
        device=group.device, phases=Phases(), files=request.files,
    )  # fmt: skip
    parallelize(pipe, Options(window="full", text_attention="exact"), group=group)
    sampling, (height, width) = request.sampling, request.size

    def draw(index: int) -> None:
        prompt = prompts[index % len(prompts)]
        with torch.inference_mode():
            pictures = generate(
                pipe, prompt, height=height, width=width, seed=index, cascade=False,
                num_inference_steps=sampling.steps, guidance_scale=sampling.guidance_scale,
                negative_prompt=request.negative_prompt if sampling.passes > 1 else None,
                true_cfg_scale=sampling.true_cfg_scale, max_sequence_length=request.max_sequence_length,
            )  # fmt: skip
        with alike(group):
            for picture in pictures:
                with replacing(files[index]) as partial:
                    picture.save(partial)
                with replacing(files[index].with_suffix(".json")) as partial:
                    partial.write_text(json.dumps({"prompt": prompt, "seed": index}))

    return draw_each(len(files), draw, group=group, is_there=lambda index: _is_there(files[index])).failed


def _is_there(file: Path) -> bool:
    return file.with_suffix(".json").exists()
