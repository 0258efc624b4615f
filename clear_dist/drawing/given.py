"""Pictures that a user gives: read on rank 0, to start from, as a mask, or for ControlNets."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from clear_dist.comm.group import Group
from clear_dist.drawing.control import Control, controlled
from clear_dist.drawing.drawn import Drawing
from clear_dist.engine.family import ReferringAdapter
from clear_dist.engine.striped import require_striped
from clear_dist.geometry import Rows
from clear_dist.pictures.decoding import TooDeep, decoded
from clear_dist.stages import Size

WHITE = (255, 255, 255)


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a drawing begins with beside its prompt."""

    before: Drawing | None = None
    """None: noise."""
    mask: Drawing | None = None
    """Black where `before` stays."""
    references: tuple[Image, ...] = ()
    """Pictures that the pipeline looks at, on all ranks."""
    size: Size | None = None
    """Height and width of the given picture, in pixels."""


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


def given_pictures(pipe: Any, image: Image | None, mask: Image | None, strength: float | None) -> Given:
    """Rank 0's picture, and its mask; raises ValueError on all ranks where they, or the pipeline, do not fit."""
    striped = require_striped(pipe)
    group, adapter = striped.group, striped.family.adapted(pipe)
    has_image, has_mask = group.broadcast_object((image is not None, mask is not None))
    if not adapter.starts_from_pictures and (has_mask or strength is not None):
        raise ValueError(f"mask_image and strength are for image to image, got {type(pipe).__name__}; nearest: None")
    if not has_image:
        if has_mask or strength is not None:
            raise ValueError("mask_image and strength are for a picture to start from, got no image; nearest: image")
        return Given()
    if not adapter.starts_from_pictures:
        if not isinstance(adapter, ReferringAdapter):
            raise ValueError(f"image is for pipelines that take one, got {type(pipe).__name__}; nearest: None")
        drawn, size = read_image(image, group)
        return Given(references=(group.broadcast_object(drawn),), size=size)
    before = from_image(image, group)
    if not has_mask:
        return Given(before=before, size=before.size)
    masking = from_image(None if mask is None else mask.convert("L"), group)
    if masking.size != before.size:
        raise ValueError(f"mask_image must be as large as image, {before.size} pixels, got {masking.size}")
    return Given(before=before, mask=masking, size=before.size)
