"""From the command line and from Python: pictures of the stock pipelines, stage by stage, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch

from clear_dist import generate
from clear_dist.comm.group import Group
from clear_dist.parallelize import parallelize
from tests.families.z_image.test_transformer import NEGATIVE, PROMPT
from tests.families.z_image.tiny import make_tiny_z_image
from tests.ranks import run_ranks

NATIVE, LARGE = (96, 176), (192, 336)
"""In pixels: 66 tokens, 30 of padding; 12 rows of 21."""
GUIDED = {"negative_prompt": NEGATIVE, "true_cfg_scale": 3.0, "guidance_scale": 0.0}


def drawn(group: Group, options: dict[str, Any], settings: dict[str, Any]) -> list[np.ndarray]:
    pipe = make_tiny_z_image()
    handle = parallelize(pipe, group=group, **options)
    pictures = generate(pipe, PROMPT, height=NATIVE[0], width=NATIVE[1], num_inference_steps=2, seed=5, **settings)
    handle.undo()
    return [np.asarray(picture) for picture in pictures]


def stock(guidance: float) -> np.ndarray:
    (picture,) = make_tiny_z_image()(
        PROMPT,
        negative_prompt=NEGATIVE,
        height=NATIVE[0],
        width=NATIVE[1],
        num_inference_steps=2,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(5),
    ).images
    return np.asarray(picture)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_pictures_are_the_stock_pipelines(size: int, guidance: float) -> None:
    """The VAE over stripes too; a byte may round the other way."""
    settings = GUIDED if guidance else {"guidance_scale": 0.0}
    (picture,), *others = run_ranks(drawn, size, {"window": "full"}, settings)
    assert not any(others)
    assert np.abs(picture.astype(int) - stock(guidance)).max() <= 1
