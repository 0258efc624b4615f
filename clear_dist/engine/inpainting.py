"""The part of a picture that stays as it is, in latents: what diffusers' inpainting pipelines do after each step.

Shapes: B pictures, C channels, H rows and W columns of latents as `from_vae` returns them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


@dataclass
class Kept:
    """Kept parts of a picture during one run of an image-to-image pipeline."""

    start: Tensor
    """[B or 1, C, H, W]."""
    mask: Tensor
    """[1, 1, H, W]: 1 where it is drawn anew, 0 where it stays."""
    generator: Callable[[], torch.Generator]
    """Makes one as the pipeline was given, whose first draw is the noise."""
    packed: Callable[[Tensor], Tensor]
    """Latents in the layout that the pipeline's callbacks see."""
    _tensors: tuple[Tensor, Tensor, Tensor] | None = field(default=None, init=False)

    def put_back(self, scheduler: Any, latents: Tensor) -> Tensor:
        """Latents after a step, the kept ones with as much noise as the next step expects."""
        if self._tensors is None:
            self._tensors = self._prepared(latents)
        start, mask, noise = self._tensors
        timestep = scheduler.timesteps[:1]  # only counted: the scheduler knows its step
        return ((1 - mask) * scheduler.scale_noise(start, timestep, noise) + mask * latents).to(latents.dtype)

    def _prepared(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        start = self.start.to(latents)
        shape = len(latents), *start.shape[1:]
        noise = randn_tensor(shape, generator=self.generator(), device=latents.device, dtype=latents.dtype)
        return self.packed(start), self.packed(self.mask.to(latents).expand_as(start)), self.packed(noise)
