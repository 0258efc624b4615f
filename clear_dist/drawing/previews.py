"""Small pictures of the generation under way, every few steps, so that a person can stop in time."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image, fromarray
from torch import Tensor

from clear_dist.drawing.encoding import to_bytes
from clear_dist.engine.striped import require_striped
from clear_dist.launch.ends import describe, say
from clear_dist.pictures import replacing
from clear_dist.pictures.srgb import profile
from clear_dist.stages import Stage
from clear_dist.weights.offload import brought

LONGEST_SIDE = 512
"""Longest side in pixels that is decoded."""
LEAST_SIDE = 2


class Previews:
    """Writes, on one rank, the finished picture as the current step expects it.

    The velocity is the difference of two steps' latents, so there is no preview after a stage's first step, nor
    where it is gone on with.
    """

    def __init__(self, file: Path, every: int) -> None:
        self._file = file
        self._every = every
        self._before: Tensor | None = None

    def after_step(self, pipe: Any, stage: Stage, done: int, latents: Tensor) -> None:
        if done % self._every == 0 and done > 1 and self._before is not None:
            sigmas = pipe.scheduler.sigmas
            index = pipe.scheduler.step_index
            velocity = (latents[:1] - self._before) / (sigmas[index] - sigmas[index - 1])
            self._write(pipe, stage, latents[:1] - sigmas[index] * velocity)
        is_due = (done + 1) % self._every == 0 and done < stage.sampling.steps
        self._before = latents[:1] if is_due else None

    @torch.no_grad()
    def _write(self, pipe: Any, stage: Stage, clean: Tensor) -> None:
        vae = pipe.vae
        adapter = require_striped(pipe).family.adapted(pipe)
        latents_BCHW = adapter.unpacked(clean, slice(None), stage.size)
        shrink = min(1.0, LONGEST_SIDE / max(stage.size))
        size = [max(LEAST_SIDE, round(side * shrink)) for side in latents_BCHW.shape[2:]]
        small = F.interpolate(latents_BCHW.float(), size, mode="area")
        with brought(vae):
            pixels_BCHW = to_bytes(vae.decode(adapter.for_vae(small).to(vae.dtype)).sample)
        self._keep(fromarray(pixels_BCHW[0].permute(1, 2, 0).cpu().numpy()))

    def _keep(self, picture: Image) -> None:
        try:
            with replacing(self._file) as partial:
                picture.save(partial, icc_profile=profile())
        except OSError as error:  # no reason to lose the picture itself
            say(f"warning: no preview: {describe(error)}")
