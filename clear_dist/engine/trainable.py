"""A transformer as training sees it: which layers are compared, and its arguments for latents and embeddings.

Shapes: B pictures, C channels, H rows and W columns of latents, as `PipelineAdapter.from_vae` makes them.
"""

import re
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from clear_dist.engine.family import Inputs


class Trainable(Protocol):
    """Flow-matching model: noisy latents are (1 - sigma) latents + sigma noise, the velocity is noise - latents."""

    text_first: bool
    """Whether text tokens come before the image's in its attention."""
    compared: re.Pattern[str]
    """Names of the attention layers of which Eq. 5 compares some."""
    packing: int
    """Latents of this layout along the side of a token."""

    def inputs(self, latents_BCHW: Tensor, sigmas_B: Tensor, embeddings: Sequence[Tensor], guidance: float) -> Inputs:
        """Arguments of the forward.

        `embeddings` are the first of `PipelineAdapter.arguments`, a row per picture; `guidance` is for models that have
        an embedding of it.
        """

    def velocity(self, output: tuple, like_BCHW: Tensor) -> Tensor:
        """Velocity [B, C, H, W] from the forward's output."""
