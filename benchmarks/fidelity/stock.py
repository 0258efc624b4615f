"""Pictures of the embedded model's kind by stock diffusers, and what patterns that see all pairs have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clear_dist import demo
from clear_dist.training.attention import Layout


def drawn(pipe: Any, captions: Sequence[str], *, res: int, steps: int, first_seed: int = 0) -> np.ndarray:
    """Bytes [captions, res, res, 3], picture i from the noise of seed `first_seed` + i."""
    with torch.inference_mode():
        images = pipe(
            list(captions),
            negative_prompt=[""] * len(captions),
            height=res,
            width=res,
            num_inference_steps=steps,
            true_cfg_scale=demo.DEFAULT_TRUE_CFG_SCALE,
            max_sequence_length=demo.DEFAULT_MAX_SEQUENCE_LENGTH,
            generator=[torch.Generator().manual_seed(first_seed + index) for index in range(len(captions))],
        ).images
    return np.stack([np.asarray(image) for image in images])


class AllPairs:
    """What a pattern answers that learns nothing and multiplies all queries by all keys."""

    def parameters(self, layout: Layout, heads: int, head_dim: int) -> Mapping[str, Tensor]:
        return {}

    def operations(self, layout: Layout, text: int, heads: int, head_dim: int) -> int:
        return 4 * heads * head_dim * (text + layout.image) ** 2
