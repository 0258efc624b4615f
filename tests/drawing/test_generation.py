"""`clear_dist.generate`: prompts on rank 0 only, pictures on rank 0 only, the same noise as the stock pipeline's."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxInpaintPipeline
from PIL.Image import fromarray, new

import clear_dist
from clear_dist.comm.group import Group
from clear_dist.drawing.given import from_image
from tests.ranks import run_ranks
from tests.tiny import make_tiny_pipeline

REQUEST: dict[str, Any] = {
    "height": 96,
    "width": 80,
    "num_inference_steps": 2,
    "negative_prompt": "fog",
    "true_cfg_scale": 2.0,
    "max_sequence_length": 8,
}


def generated(group: Group) -> list[np.ndarray]:
    pipe = make_tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    if group.rank > 0:
        pipe.register_modules(text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None)
    clear_dist.parallelize(pipe, window="full", group=group)
    return [np.asarray(picture) for picture in clear_dist.generate(pipe, ["a hill", "a lake"], seed=5, **REQUEST)]


def test_pictures_are_the_stock_pipelines() -> None:
    first, second = run_ranks(generated, 2)
    pipe = make_tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    stock = pipe(
        ["a hill", "a lake"],
        **(REQUEST | {"negative_prompt": ["fog", "fog"]}),
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images
    assert second == []
    assert len(first) == 2
    for picture, expected in zip(first, stock, strict=True):
        assert np.abs(picture / 255 - expected).max() < 1.5 / 255


def test_what_a_transparent_picture_hides_is_not_drawn() -> None:
    hidden = fromarray(np.full((16, 32, 4), (255, 0, 255, 0), np.uint8))
    group = Group.create("cpu")
    try:
        pixels = from_image(hidden, group).pixels
    finally:
        group.close()
    assert pixels is not None and (pixels == 255).all()


def test_a_picture_is_upright_and_of_8_bits() -> None:
    lying = fromarray(np.arange(16 * 32 * 3, dtype=np.uint16).astype(np.uint8).reshape(16, 32, 3))
    lying.getexif()[0x0112] = 6
    group = Group.create("cpu")
    try:
        pixels = from_image(lying, group).pixels
        with pytest.raises(ValueError, match=r"must have 8 bits a channel, and has more \(I;16\)"):
            from_image(new("I;16", (32, 16)), group)
    finally:
        group.close()
    assert pixels is not None
    assert np.array_equal(pixels[0].permute(1, 2, 0).numpy(), np.rot90(np.asarray(lying), -1))


def test_sizes_and_pipelines_are_checked() -> None:
    pipe = make_tiny_pipeline()
    with pytest.raises(ValueError, match="parallelize"):
        clear_dist.generate(pipe, "a hill")
    parallelized = clear_dist.parallelize(pipe, window=4)
    try:
        with pytest.raises(ValueError, match="multiple of 16 pixels, got 100; nearest: 96"):
            clear_dist.generate(pipe, "a hill", height=100, width=96)
        with pytest.raises(ValueError, match=r"draws with a FluxPipeline, .*got FluxInpaintPipeline"):
            clear_dist.generate(FluxInpaintPipeline(**pipe.components), "a hill")
    finally:
        parallelized.undo()
