"""Pictures of any size from a prompt or a picture, with a parallelized pipeline: one call on every rank."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, fromarray
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.comm.rows import collect_stripes
from clear_dist.drawing.cascade import Cascade, Drawing, unit_size
from clear_dist.drawing.control import Control, controlled
from clear_dist.drawing.prompts import encode_prompts
from clear_dist.engine.agreement import require_equal_settings
from clear_dist.engine.striped import require_striped
from clear_dist.families.transformers import PIPELINES
from clear_dist.geometry import Rows
from clear_dist.pictures.decoding import TooDeep, decoded
from clear_dist.stages import Sampling, Size, Stage, Upscaling, plan_cascade, plan_upscaling, refining_steps

WHITE = (255, 255, 255)


def generate(
    pipe: Any,
    prompt: str | list[str],
    *,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 28,
    guidance_scale: float = 3.5,
    negative_prompt: str | None = None,
    true_cfg_scale: float = 1.0,
    max_sequence_length: int = 512,
    num_images: int = 1,
    seed: int = 0,
    cascade: bool = True,
    base_resolution: int | None = None,
    upscaling: Upscaling | None = None,
    control_image: Image | list[Image] | None = None,
    controlnet_conditioning_scale: float | list[float] = 1.0,
    control_mode: int | list[int | None] | None = None,
) -> list[Image]:
    """Pictures of `prompt` on rank 0; the other ranks take part and get an empty list.

    Args:
        pipe: a parallelized pipeline; only rank 0 needs its text encoders.
        height, width: pixels, in whole tokens or down-sampled keys; None: the native size.
        seed: of a CPU generator: the stock pipeline's noise on any number of ranks.
        cascade: draw at the native size first, then enlarge and refine, about 2 times a stage (paper, Sec. 4.3).
        base_resolution: pixels along a square as large as the first stage; None: the native size.
        upscaling: of upper stages, guidance too; None: as in CLEAR's notebook, `num_inference_steps` x 0.7 steps.
        control_image: for a pipeline with a ControlNet, on rank 0, stretched to each stage's size; as many as scales
            and modes, in lists, where the pipeline takes several.

    Raises ValueError for an unsupported pipeline, a side not in whole tokens, or no room for stale buffers.
    """
    native = require_striped(pipe).family.adapted(pipe).native_size
    require_known_pipeline(pipe)
    height, width, base = (native if size is None else size for size in (height, width, base_resolution))
    require_whole_tokens(pipe, height=height, width=width, base_resolution=base)
    stages = plan_cascade(
        (height, width),
        native=base,
        token=unit_size(pipe),
        sampling=Sampling(steps=num_inference_steps, guidance_scale=guidance_scale, true_cfg_scale=true_cfg_scale),
        upscaling=upscaling or Upscaling(steps=refining_steps(num_inference_steps, Upscaling.strength)),
        cascade=cascade,
    )
    prompts = [prompt] if isinstance(prompt, str) else prompt
    controls = controls_of(pipe, control_image, controlnet_conditioning_scale, control_mode)
    embeddings = _encoded(pipe, stages, seed, prompts, negative_prompt, max_sequence_length, num_images)
    return _pictures(pipe, embeddings, stages, seed, None, controls)


def upscale(
    pipe: Any,
    image: Image | None,
    prompt: str = "",
    *,
    height: int,
    width: int,
    negative_prompt: str | None = None,
    max_sequence_length: int = 512,
    seed: int = 0,
    upscaling: Upscaling | None = None,
    control_image: Image | list[Image] | None = None,
    controlnet_conditioning_scale: float | list[float] = 1.0,
    control_mode: int | list[int | None] | None = None,
) -> list[Image]:
    """`image` enlarged and refined, stage by stage; a list of one on rank 0, empty on the others.

    Only rank 0 reads the image, on white where it is transparent, stretched where `height` and `width`, in pixels, have
    another shape. A ControlNet, if the pipeline has one, is given the image itself where there is no `control_image`.
    Raises ValueError for an unsupported pipeline, a side not in whole tokens, or a larger image.
    """
    striped = require_striped(pipe)
    require_whole_tokens(pipe, height=height, width=width)
    before = from_image(image, striped.group)
    stages = plan_upscaling(
        before.size,
        (height, width),
        native=striped.family.adapted(pipe).native_size,
        token=unit_size(pipe),
        upscaling=upscaling or Upscaling(),
    )
    controls = controls_of(pipe, control_image, controlnet_conditioning_scale, control_mode, otherwise=image)
    embeddings = _encoded(pipe, stages, seed, [prompt], negative_prompt, max_sequence_length)
    if height * width < before.size[0] * before.size[1]:
        raise ValueError(f"upscale makes pictures larger, got {height} x {width} for one of {before.size} pixels")
    return _pictures(pipe, embeddings, stages, seed, before, controls)


def require_known_pipeline(pipe: Any) -> None:
    """Raises ValueError for a pipeline that starts from anything but a prompt."""
    if not {kind.__name__ for kind in type(pipe).__mro__} & PIPELINES.keys():
        known = ", ".join(PIPELINES)
        raise ValueError(f"generate draws with a {known}, got {type(pipe).__name__}; call that pipeline itself")


def require_whole_tokens(pipe: Any, **sizes: int) -> None:
    """Raises ValueError where a size in pixels is not in whole tokens or down-sampled keys."""
    unit = unit_size(pipe)
    for name, size in sizes.items():
        if size < unit or size % unit:
            nearest = max(unit, round(size / unit) * unit)
            raise ValueError(f"{name} must be a multiple of {unit} pixels, got {size}; nearest: {nearest}")


def from_image(image: Image | None, group: Group) -> Drawing:
    """Rank 0's picture, upright, in sRGB and on white, to be enlarged; raises ValueError where it has none.

    Raises as `read_image`.
    """
    drawn, size = read_image(image, group)
    pixels = None if drawn is None else torch.from_numpy(np.array(drawn)).permute(2, 0, 1)[None].to(group.device)
    rows = (Rows(0, size[0]), *(Rows(0, 0),) * (group.size - 1))
    return Drawing(size=size, rows=rows, pixels=pixels)


def read_image(image: Image | None, group: Group) -> tuple[Image | None, Size]:
    """Rank 0's picture in RGB, on rank 0, and its size; raises ValueError where it has none.

    What is left out of it is a warning; on all ranks more than 8 bits a channel are an error.
    """
    size: Size | str | None = None
    drawn = None
    if group.rank == 0 and image is not None:
        try:
            found = decoded(image)
        except TooDeep as error:
            size = f"the picture must have 8 bits a channel, and has more ({error})"
        else:
            for note in found.notes:
                warnings.warn(f"of the picture, {note}", stacklevel=3)
            drawn = found.laid_on(WHITE)
            size = drawn.height, drawn.width
    size = group.broadcast_object(size)
    if isinstance(size, str) or size is None:
        raise ValueError(size or "rank 0 must be given the picture, got None")
    return drawn, size


def controls_of(
    pipe: Any, images: Any, scales: Any, modes: Any, *, otherwise: Image | None = None
) -> tuple[Control, ...]:
    """Control pictures with their scales and modes, one of each or lists; none for a pipeline without ControlNets.

    Raises ValueError where they are not what the pipeline's ControlNets take, or as `read_image`.
    """
    striped = require_striped(pipe)
    if getattr(pipe, "controlnet", None) is None:
        if images is not None:
            raise ValueError(f"control_image is for a pipeline with a ControlNet, got {type(pipe).__name__}")
        return ()
    given = otherwise if images is None else images
    listed = given if isinstance(given, list) else [given]
    count = striped.group.broadcast_object(len(listed))
    drawn = [read_image(image, striped.group)[0] for image in (listed if striped.group.rank == 0 else [None] * count)]
    spread = [each if isinstance(each, list) else [each] * count for each in (scales, modes)]
    controlled(striped.family.adapted(pipe)).check(spread[1])
    return tuple(
        Control(image=image, scale=scale, mode=mode) for image, scale, mode in zip(drawn, *spread, strict=True)
    )


def picture_rows(drawing: Drawing, index: int, group: Group) -> Iterator[np.ndarray]:
    """Bytes [some rows, W, 3] of picture `index` from the top, on rank 0; all ranks exhaust the iterator."""
    if drawing.pixels is None:
        rows_RWC = torch.empty(0, drawing.size[1], 3, dtype=torch.uint8)
    else:
        rows_RWC = drawing.pixels[index].permute(1, 2, 0)
    yield from map(Tensor.numpy, collect_stripes(rows_RWC, group, tuple(map(len, drawing.rows))))


def _encoded(
    pipe: Any,
    stages: tuple[Stage, ...],
    seed: int,
    prompts: list[str],
    negative_prompt: str | None,
    max_sequence_length: int,
    num_images: int = 1,
) -> dict[str, Tensor]:
    if not prompts:
        raise ValueError("prompt must be a text or a list of at least one, got an empty list")
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}; nearest: 1")
    striped = require_striped(pipe)
    require_equal_settings(striped.group, stages=stages, seed=seed, prompts=len(prompts), num_images=num_images)
    return encode_prompts(
        striped.family.adapted(pipe),
        striped.group,
        striped.counters,
        prompts,
        negative_prompts=None if negative_prompt is None else [negative_prompt] * len(prompts),
        max_sequence_length=max_sequence_length,
        num_images=num_images,
    )


def _pictures(
    pipe: Any,
    embeddings: dict[str, Tensor],
    stages: tuple[Stage, ...],
    seed: int,
    drawing: Drawing | None,
    controls: tuple[Control, ...],
) -> list[Image]:
    for drawn in Cascade(pipe, embeddings, seed=seed, controls=controls).run(stages, drawing):
        drawing = drawn
    assert drawing is not None, "there is at least one stage"
    count = len(next(iter(embeddings.values())))
    pictures = (list(picture_rows(drawing, index, require_striped(pipe).group)) for index in range(count))
    return [fromarray(np.concatenate(rows)) for rows in pictures if rows]
