"""Pictures that `generate` starts from, and masks: against diffusers' unmodified pipelines, on any number of ranks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
)
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

import clear_dist
from clear_dist.comm.group import Group
from clear_dist.families.cards import CARDS
from clear_dist.families.transformers import PIPELINES
from clear_dist.stages import ImageToImage, Sampling, Upscaling, size_like
from tests.families.sd3.tiny import make_tiny_pipeline as make_tiny_sd3
from tests.families.z_image.tiny import make_tiny_z_image
from tests.ranks import run_ranks
from tests.tiny import make_tiny_pipeline

HEIGHT, WIDTH, STEPS, STRENGTH, SEED, TEXT = 112, 80, 5, 0.5, 3, 12
RANDOM = np.random.default_rng(7)
PICTURE = Image.fromarray(RANDOM.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))
MASK = Image.fromarray(RANDOM.choice(np.array([0, 90, 160, 255], np.uint8), (7, 5))).resize(
    PICTURE.size, Image.Resampling.NEAREST
)


class InpaintedInLatents(ZImageInpaintPipeline):
    """Stock but for the latents of what is under the mask, which it encodes and never uses."""

    def prepare_mask_latents(self, mask: Tensor, *given: Any, **_: Any) -> tuple[Tensor, None]:
        return torch.nn.functional.interpolate(mask, size=(HEIGHT // 8, WIDTH // 8)), None


MAKERS: dict[str, Callable[[], Any]] = {
    "dit": make_tiny_pipeline,
    "mmdit": lambda: make_tiny_sd3("medium"),
    "single stream": make_tiny_z_image,
}
STOCK: dict[str, tuple[Any, Any]] = {
    "dit": (FluxImg2ImgPipeline, FluxInpaintPipeline),
    "mmdit": (StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline),
    "single stream": (ZImageImg2ImgPipeline, InpaintedInLatents),
}
GUIDANCE: dict[str, dict[str, Any]] = {
    "dit": {"guidance_scale": 3.5},
    "mmdit": {"guidance_scale": 1.0},
    "single stream": {"guidance_scale": 0.0},
}


def drawn(group: Group) -> dict[str, list[np.ndarray]]:
    """All of the picture, and parts, two pictures of each."""
    found = {}
    for family, make in MAKERS.items():
        pipe = make()
        pipe.set_progress_bar_config(disable=True)
        handle = clear_dist.parallelize(pipe, window="full", group=group)
        found[family] = []
        for mask in (None, MASK):
            image = PICTURE if group.rank == 0 else None
            given: dict[str, Any] = {"mask_image": mask if group.rank == 0 else None, "strength": STRENGTH}
            pictures = clear_dist.generate(
                pipe, "a hill", image=image, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, num_images=2,
                max_sequence_length=TEXT, seed=SEED, **given, **GUIDANCE[family],
            )  # fmt: skip
            found[family] += [np.asarray(each).astype(int) for each in pictures]
        handle.undo()
    return found


def stock(family: str) -> list[np.ndarray]:
    pipe, pictures = MAKERS[family](), []
    vae = pipe.vae
    with torch.no_grad():
        mean = vae.encode(pipe.image_processor.preprocess(PICTURE, HEIGHT, WIDTH)).latent_dist.mode()
    start = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    given: dict[str, Any] = {"prompt": "a hill", "image": start, "strength": STRENGTH, "num_inference_steps": STEPS}
    given |= {"height": HEIGHT, "width": WIDTH, "max_sequence_length": TEXT, "num_images_per_prompt": 2}
    for kind, mask in zip(STOCK[family], (None, MASK), strict=True):
        other = kind(**pipe.components)
        other.set_progress_bar_config(disable=True)
        if family == "single stream":  # its own takes latents for a picture
            other.image_processor = VaeImageProcessor(vae_scale_factor=16, vae_latent_channels=16)
        masked = {} if mask is None else {"mask_image": mask, "masked_image_latents": start}
        given |= {"generator": torch.Generator().manual_seed(SEED), **GUIDANCE[family], **masked}
        if kind is StableDiffusion3InpaintPipeline:  # it decodes without the VAE's shift
            latents = other(**given, output_type="latent").images
            decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
            images = other.image_processor.postprocess(decoded)
        else:
            images = other(**given).images
        pasted = images if mask is None else [other.image_processor.apply_overlay(mask, PICTURE, x) for x in images]
        pictures += [np.asarray(each.convert("RGB")).astype(int) for each in pasted]
    return pictures


@pytest.fixture(scope="module")
def on_ranks() -> dict[int, dict[str, list[np.ndarray]]]:
    return {size: run_ranks(drawn, size)[0] for size in (1, 3)}


@pytest.mark.parametrize("family", MAKERS)
def test_pictures_are_those_of_stock_image_to_image_and_inpainting(family: str, on_ranks: Any) -> None:
    expected = stock(family)
    for size in (1, 3):
        assert len(on_ranks[size][family]) == len(expected) == 4
        for picture, other in zip(on_ranks[size][family], expected, strict=True):
            assert np.abs(picture - other).max() <= 2
    stays, own = np.asarray(MASK) == 0, np.asarray(PICTURE)
    assert (on_ranks[3][family][2][stays] == own[stays]).all()
    assert np.abs(expected[0] - own).mean() > 10


LARGE = Image.fromarray(RANDOM.integers(0, 256, (150, 110, 3), np.uint8))
HALF = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 150, axis=0).repeat(55, axis=1))


def in_stages(group: Group) -> np.ndarray | None:
    pipe = make_tiny_pipeline(sample_size=96)
    pipe.set_progress_bar_config(disable=True)
    clear_dist.parallelize(pipe, window=4, text_attention="exact", group=group)
    upper = Upscaling(steps=1, strength=0.5)
    pictures = clear_dist.generate(
        pipe, "a lake", image=LARGE, mask_image=HALF, height=240, num_inference_steps=2, max_sequence_length=TEXT,
        upscaling=upper,
    )  # fmt: skip
    return np.asarray(pictures[0]).astype(int) if pictures else None


def test_what_stays_is_the_picture_in_every_stage() -> None:
    """Four stripes of the first stage, seven of the last, so that one of five ranks idles first."""
    alone, several = (run_ranks(in_stages, size)[0] for size in (1, 5))
    assert alone is not None and several is not None
    assert alone.shape == (240, 176, 3)
    assert np.abs(alone - several).max() <= 2
    own = np.asarray(LARGE.resize((176, 240), Image.Resampling.BICUBIC)).astype(int)
    stays = np.asarray(HALF.resize((176, 240), Image.Resampling.BICUBIC)) == 0
    assert stays.mean() > 0.4
    assert np.abs(several - own)[stays].max() <= 1
    assert np.abs(several - own)[:, -60:].mean() > 10


def test_pictures_must_fit_each_other() -> None:
    pipe = make_tiny_pipeline()
    handle = clear_dist.parallelize(pipe, window=4)
    try:
        with pytest.raises(ValueError, match=r"mask_image must be as large as image, .* got \(112, 80\)"):
            clear_dist.generate(pipe, "a hill", image=LARGE, mask_image=MASK)
        with pytest.raises(ValueError, match="for a picture to start from, got no image"):
            clear_dist.generate(pipe, "a hill", mask_image=MASK)
        with pytest.raises(ValueError, match="got no image"):
            clear_dist.generate(pipe, "a hill", strength=0.5)
        with pytest.raises(ValueError, match="strength must be above 0 and at most 1"):
            clear_dist.generate(pipe, "a hill", image=LARGE, strength=1.5)
    finally:
        handle.undo()


def test_cards_say_which_pipelines_can_start_from_a_picture() -> None:
    assert {kind: adapter.starts_from_pictures for kind, adapter in PIPELINES.items() if CARDS.of_pipeline(kind)} == {  # type: ignore[attr-defined]
        card.pipeline: card.starts_from_pictures for card in CARDS.cards
    }


@pytest.mark.parametrize(
    ("steps", "strength", "taken"), [(28, 0.6, 17), (4, 0.6, 3), (1, 0.6, 1), (50, 1.0, 50), (10, 0.001, 1)]
)
def test_steps_are_those_that_diffusers_takes(steps: int, strength: float, taken: int) -> None:
    found = ImageToImage.of(Sampling(steps=steps), strength)
    assert (found.steps, found.schedule) == (taken, steps)


def test_a_pictures_shape_decides_what_is_not_given() -> None:
    assert size_like((1000, 1000), None, None, native=256, unit=16) == (256, 256)
    assert size_like((2000, 3000), None, None, native=1024, unit=16) == (832, 1248)
    assert size_like((2000, 3000), 640, None, native=1024, unit=16) == (640, 960)
    assert size_like((2000, 3000), None, 640, native=1024, unit=32) == (416, 640)
    assert size_like((3, 90_000), None, None, native=256, unit=16)[0] == 16
