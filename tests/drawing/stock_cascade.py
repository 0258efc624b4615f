"""A cascade of two stages by diffusers alone: a pipeline, and image-to-image of its parts with the paper's changes."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline
from PIL import Image
from torch import Tensor

from clear_dist.stages import Sampling, Size, Stage, Upscaling
from tests.drawing.test_cascade import TEXT, official_start, with_paper_changes
from tests.refining.drawing import PROMPT, seed_of


def two_stages(lower: Size, upper: Size) -> tuple[Stage, Stage]:
    """As `stock` draws them."""
    refined = Upscaling(steps=2, strength=0.5, guidance_scale=7.5)
    return (
        Stage(height=lower[0], width=lower[1], sampling=Sampling(steps=2, guidance_scale=3.5)),
        Stage(height=upper[0], width=upper[1], sampling=refined),
    )


def stock(
    pipe: Any,
    picture: Image.Image,
    stages: tuple[Stage, Stage],
    *,
    between: Callable[[Any], None] = lambda refining: None,
    counted: int = 1,
) -> tuple[Tensor, Tensor]:
    """Latents of `two_stages`; `picture` is the lower one's, in 8 bits.

    `between` the stages the second pipeline may be changed. Its positions are those of tokens of 16 pixels, of which a
    token of the model may be several a side, `counted`.
    """
    lower, upper = stages
    common: dict[str, Any] = {"prompt": PROMPT, "max_sequence_length": TEXT, "output_type": "latent"}
    generators = [torch.Generator().manual_seed(seed_of(stage)) for stage in range(2)]
    size: dict[str, Any] = {"height": lower.height, "width": lower.width}
    first = pipe(**size, num_inference_steps=2, guidance_scale=3.5, generator=generators[0], **common)
    static = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, use_dynamic_shifting=False)
    refining = FluxImg2ImgPipeline(**{**pipe.components, "scheduler": static})
    refining.set_progress_bar_config(disable=True)
    between(refining)
    with torch.no_grad():
        start = official_start(pipe, [picture], upper.size)
        with_paper_changes(pipe.transformer, Stage(height=upper.height // counted, width=upper.width // counted))
    how: dict[str, Any] = {"num_inference_steps": 4, "strength": 0.5, "guidance_scale": 7.5, "generator": generators[1]}
    second = refining(image=start, height=upper.height, width=upper.width, **how, **common)
    return first.images, second.images
