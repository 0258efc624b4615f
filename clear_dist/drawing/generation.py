"""Pictures of any size from a prompt or a picture, with a parallelized pipeline: one call on every rank."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, fromarray
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.comm.rows import collect_stripes
from clear_dist.drawing.cascade import Cascade, unit_size
from clear_dist.drawing.control import Control
from clear_dist.drawing.drawn import Drawing
from clear_dist.drawing.given import Given, controls_of, from_image, given_pictures
from clear_dist.drawing.prompts import encode_prompts
from clear_dist.engine.adapters import require_adapters
from clear_dist.engine.agreement import require_equal_settings
from clear_dist.engine.striped import require_striped
from clear_dist.families.transformers import PIPELINES
from clear_dist.stages import (
    NTK,
    AtStages,
    ImageToImage,
    Sampling,
    Size,
    Stage,
    Upscaling,
    check_adapter,
    check_refining,
    plan_cascade,
    plan_upscaling,
    size_like,
    with_adapters,
)

NOTEBOOK_STEPS = 20
"""Steps that CLEAR's notebook draws pictures in, which `upscale` is not told."""


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
    image: Image | None = None,
    mask_image: Image | None = None,
    strength: float | None = None,
    cascade: bool = True,
    base_resolution: int | None = None,
    refinement: str | None = None,
    upscaling: Upscaling | None = None,
    lora_stages: Mapping[str, AtStages] | None = None,
    control_image: Image | list[Image] | None = None,
    controlnet_conditioning_scale: float | list[float] = 1.0,
    control_mode: int | list[int | None] | None = None,
) -> list[Image]:
    """Pictures of `prompt` on rank 0; the other ranks take part and get an empty list.

    Args:
        pipe: a parallelized pipeline; only rank 0 needs its text encoders.
        height, width: pixels, in whole tokens or down-sampled keys; None: the native size, or in the image's shape.
        seed: of a CPU generator: the stock pipeline's noise on any number of ranks.
        image, mask_image: rank 0's, to start from (or look at), read as by `upscale`; it stays where the mask is black.
        strength: share of noise in `image`, and of the steps, as in diffusers (None: 0.6).
        cascade, base_resolution: first as large as a square of such a side (None: native), then about 2 times a stage.
        refinement, upscaling: how upper stages are refined, in a word or by all settings; None: as in CLEAR's notebook.
        lora_stages: "upper", or a number of pixels, by the names of adapters that work in these stages only (`--lora`).
        control_image: for a pipeline with ControlNets, on rank 0, stretched to each stage's size; a list for several.

    Raises ValueError for an unsupported pipeline, a side not in whole tokens, pictures that do not fit, or no room.
    """
    require_known_pipeline(pipe)
    given = given_pictures(pipe, image, mask_image, strength)
    sampling = Sampling(steps=num_inference_steps, guidance_scale=guidance_scale, true_cfg_scale=true_cfg_scale)
    sampling = sampling if given.before is None else ImageToImage.of(sampling, strength)
    upper = _upper(upscaling, refinement, num_inference_steps)
    stages = _planned(pipe, (height, width), given.size, sampling, upper, base=base_resolution, cascade=cascade)
    stages = _checked(pipe, stages, refinement, lora_stages)
    controls = controls_of(pipe, control_image, controlnet_conditioning_scale, control_mode)
    embeddings = _encoded(pipe, stages, seed, prompt, negative_prompt, max_sequence_length, num_images)
    return _pictures(pipe, embeddings, stages, seed, given, controls)


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
    refinement: str | None = None,
    upscaling: Upscaling | None = None,
    lora_stages: Mapping[str, AtStages] | None = None,
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
        upscaling=_upper(upscaling, refinement, NOTEBOOK_STEPS),
    )
    stages = _checked(pipe, stages, refinement, lora_stages)
    controls = controls_of(pipe, control_image, controlnet_conditioning_scale, control_mode, otherwise=image)
    embeddings = _encoded(pipe, stages, seed, prompt, negative_prompt, max_sequence_length)
    if height * width < before.size[0] * before.size[1]:
        raise ValueError(f"upscale makes pictures larger, got {height} x {width} for one of {before.size} pixels")
    return _pictures(pipe, embeddings, stages, seed, Given(before=before), controls)


def _upper(upscaling: Upscaling | None, refinement: str | None, steps: int) -> Upscaling:
    if upscaling is not None and refinement is not None:
        raise ValueError(f"either upscaling or refinement can be given, got {refinement!r} too; leave one out")
    return upscaling or Upscaling().above(steps, refinement)


def _checked(
    pipe: Any, stages: tuple[Stage, ...], refinement: str | None, lora_stages: Mapping[str, AtStages] | None
) -> tuple[Stage, ...]:
    """Stages in which LoRA rest that are for others; raises ValueError where there is none for one, or to refine."""
    check_refining(stages, refinement)
    require_own_positions(pipe, stages)
    where = lora_stages or {}
    require_adapters(pipe.transformer, tuple(where))
    for each in where.values():
        check_adapter(stages, each)
    return with_adapters(stages, where)


def require_own_positions(pipe: Any, stages: tuple[Stage, ...]) -> None:
    """Raises ValueError where a model with YaRN is to have other positions; NTK's factor says nothing to it."""
    if not require_striped(pipe).family.adapted(pipe).has_yarn:
        return
    for upper in (stage.sampling for stage in stages if isinstance(stage.sampling, Upscaling)):
        if upper.interpolate_positions or upper.ntk != NTK[0]:
            got = f"ntk={upper.ntk!r}, interpolate_positions={upper.interpolate_positions}"
            raise ValueError(f"upscaling must leave positions with YaRN alone, got {got}; nearest: ntk='plain', False")


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


def picture_rows(drawing: Drawing, index: int, group: Group) -> Iterator[np.ndarray]:
    """Bytes [some rows, W, 3] of picture `index` from the top, on rank 0; all ranks exhaust the iterator."""
    if drawing.pixels is None:
        rows_RWC = torch.empty(0, drawing.size[1], 3, dtype=torch.uint8)
    else:
        rows_RWC = drawing.pixels[index].permute(1, 2, 0)
    yield from map(Tensor.numpy, collect_stripes(rows_RWC, group, tuple(map(len, drawing.rows))))


def _planned(
    pipe: Any,
    given: tuple[int | None, int | None],
    picture: Size | None,
    sampling: Sampling,
    upscaling: Upscaling,
    *,
    base: int | None,
    cascade: bool,
) -> tuple[Stage, ...]:
    """Stages to the size given, height first, of which the native size or the picture tells the rest."""
    native, token = require_striped(pipe).family.adapted(pipe).native_size, unit_size(pipe)
    base = native if base is None else base
    if picture is not None:
        given = size_like(picture, *given, native=base, unit=token)
    height, width = (native if side is None else side for side in given)
    require_whole_tokens(pipe, height=height, width=width, base_resolution=base)
    return plan_cascade(
        (height, width), native=base, token=token, sampling=sampling, upscaling=upscaling, cascade=cascade
    )


def _encoded(
    pipe: Any,
    stages: tuple[Stage, ...],
    seed: int,
    prompt: str | list[str],
    negative_prompt: str | None,
    max_sequence_length: int,
    num_images: int = 1,
) -> dict[str, Tensor]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
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
    given: Given,
    controls: tuple[Control, ...],
) -> list[Image]:
    drawing = given.before
    cascade = Cascade(pipe, embeddings, seed=seed, controls=controls, mask=given.mask, references=given.references)
    for drawn in cascade.run(stages, drawing):
        drawing = drawn
    assert drawing is not None, "there is at least one stage"
    count = len(next(iter(embeddings.values())))
    pictures = (list(picture_rows(drawing, index, require_striped(pipe).group)) for index in range(count))
    return [fromarray(np.concatenate(rows)) for rows in pictures if rows]
