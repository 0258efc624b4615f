"""Reference images of FLUX.2 and FLUX.1 Kontext: tokens that everybody sees and that see everybody, on N ranks."""

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinInpaintPipeline, Flux2KleinKVPipeline, FluxKontextPipeline
from PIL import Image
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.engine import parts
from clear_dist.engine.references import raster_ids
from clear_dist.families.flux.transformer import Flux
from clear_dist.families.flux2.transformer import Flux2
from clear_dist.parallelize import parallelize
from tests.families.flux2.oracle import in_parallel
from tests.families.flux2.tiny import make_tiny_dev, make_tiny_klein
from tests.oracle import DenseClearProcessor, circle
from tests.ranks import run_ranks
from tests.test_parallelize import relative_error
from tests.tiny import make_tiny_pipeline

HEIGHT, WIDTH, RADIUS, TEXT = 7, 5, 3, 9
"""In tokens: rows that 2, 3 and 5 ranks don't divide; on 5 stripes are thinner than a halo."""
SIZES = ((4, 5), (6, 4))
"""Sizes of two references in tokens; Kontext takes the first."""
EXACT: dict[str, Any] = {"window": RADIUS, "text_attention": "exact"}
CASES: list[dict[str, Any]] = [
    {"window": "full", "text_tokens": "replicated"},
    {"window": "full", "text_tokens": "sharded"},
    EXACT | {"text_tokens": "replicated"},
    EXACT | {"text_tokens": "sharded"},
    EXACT | {"schedule": "stale", "warmup_steps": 3},
    EXACT | {"shard_weights": True, "hoist_modulation": True},
    EXACT | {"text_tokens": "sharded", "cut": "columns"},
]
KLEIN, BASE, DEV, KONTEXT = "klein", "klein-base", "dev", "Kontext"


def make(name: str) -> Any:
    if name == KONTEXT:
        pipe = FluxKontextPipeline(**make_tiny_pipeline().components)
    else:
        pipe = make_tiny_dev() if name == DEV else make_tiny_klein(is_distilled=name == KLEIN)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, name: str) -> Tensor:
    """Latents after three steps from pictures of the tests' own noise."""
    generator = torch.Generator().manual_seed(5)
    pictures = [torch.randint(0, 256, (16 * h, 16 * w, 3), generator=generator).byte().numpy() for h, w in SIZES]
    images = [Image.fromarray(picture) for picture in pictures]
    common: dict[str, Any] = {"height": 16 * HEIGHT, "width": 16 * WIDTH, "num_inference_steps": 3}
    if name == KONTEXT:
        words = {"prompt": "a hill", "max_sequence_length": TEXT, "image": images[0]}
        words |= {"_auto_resize": False, "max_area": 256 * HEIGHT * WIDTH}
    else:
        prompts = torch.randn(2, TEXT, 24, generator=generator).split(1)
        negative = {"negative_prompt_embeds": prompts[1]} if name == BASE else {}
        words = {"prompt_embeds": prompts[0], **negative, "image": images, "guidance_scale": 3.0}
    return pipe(**common, **words, generator=generator, output_type="latent").images


class Dense(DenseClearProcessor):
    """Picture, then references, after the text: the picture's window, and everybody for all others."""

    def __init__(self, references: int) -> None:
        super().__init__(HEIGHT, WIDTH, RADIUS)
        picture = HEIGHT * WIDTH
        self.seen = torch.ones(picture + references, picture + references, dtype=torch.bool)
        self.seen[:picture, :picture] = circle(HEIGHT, WIDTH, RADIUS)


@cache
def expected(name: str, is_full: bool) -> Tensor:
    pipe = make(name)
    if not is_full:
        sizes = SIZES[:1] if name == KONTEXT else SIZES
        pipe.transformer.set_attn_processor(Dense(sum(height * width for height, width in sizes)))
        if name != KONTEXT:
            in_parallel(pipe)
    return run(pipe, name)


def drawn(group: Group, name: str, cases: list[dict[str, Any]], most_tokens: int) -> list[Tensor]:
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "MOST_TOKENS", most_tokens)
        for case in cases:
            pipe = make(name)
            handle = parallelize(pipe, group=group, **case)
            results.append(run(pipe, name))
            handle.undo()
    return results


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("name", [BASE, DEV, KONTEXT])
def test_references_are_seen_by_all_and_see_all(name: str, size: int) -> None:
    for most_tokens in (parts.MOST_TOKENS, 20)[: 1 + (size == 3)]:
        for results in run_ranks(drawn, size, name, CASES, most_tokens):
            for case, latents in zip(CASES, results, strict=True):
                assert relative_error(latents, expected(name, case["window"] == "full")) < 1e-4, case
    assert relative_error(expected(name, True), expected(name, False)) > 1e-2, "the window matters"


def with_and_without(group: Group) -> list[Tensor]:
    """One pipeline object draws with references, then without, then with them."""
    pipe = make(KLEIN)
    parallelize(pipe, group=group, **EXACT)
    words: dict[str, Any] = {"height": 112, "width": 80, "num_inference_steps": 2, "output_type": "latent"}
    embeddings = torch.randn(1, TEXT, 24, generator=torch.Generator().manual_seed(0))
    plain = pipe(prompt_embeds=embeddings, generator=torch.Generator().manual_seed(1), **words).images
    first = run(pipe, KLEIN)
    again = pipe(prompt_embeds=embeddings, generator=torch.Generator().manual_seed(1), **words).images
    return [plain, again, first, run(pipe, KLEIN)]


def test_a_pipeline_takes_references_or_none() -> None:
    for plain, again, first, second in run_ranks(with_and_without, 2):
        assert torch.equal(plain, again) and torch.equal(first, second)
        assert relative_error(first, expected(KLEIN, False)) < 1e-4


def test_inpainting_takes_references_too() -> None:
    pipe = Flux2KleinInpaintPipeline(**make_tiny_klein().components)
    pipe.set_progress_bar_config(disable=True)
    picture = Image.fromarray(torch.randint(0, 256, (112, 80, 3)).byte().numpy())
    mask = Image.fromarray((255 * torch.randint(0, 2, (112, 80))).byte().numpy())
    embeddings = torch.randn(1, TEXT, 24)

    def edited() -> Tensor:
        return pipe(
            prompt_embeds=embeddings, image=picture, image_reference=picture, mask_image=mask, height=112, width=80,
            num_inference_steps=4, strength=0.8, guidance_scale=1.0, generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images  # fmt: skip

    expected = edited()
    handle = parallelize(pipe, window="full")
    found = edited()
    handle.undo()
    assert relative_error(found, expected) < 1e-4


def test_references_that_are_kept_from_the_first_step_are_refused() -> None:
    pipe = Flux2KleinKVPipeline(**make_tiny_klein().components)
    with pytest.raises(ValueError, match="must be Flux2AttnProcessor, got Flux2KVAttnProcessor"):
        parallelize(pipe, window="full")
    with pytest.raises(ValueError, match=r"cached keys of reference images .* cannot be parallelised"):
        Flux2(pipe.transformer).grid_of({"kv_cache_mode": "extract"})


def test_references_beside_controlnets_are_refused() -> None:
    pipe, tokens = make_tiny_pipeline(), HEIGHT * WIDTH
    pipe.scheduler.set_timesteps(2, mu=1.0)
    ids = raster_ids(HEIGHT, WIDTH, torch.device("cpu"))
    inputs = Flux(pipe.transformer).empty_inputs((HEIGHT, 2 * WIDTH), images=1, text_tokens=TEXT)
    inputs = {name: torch.zeros_like(x) for name, x in inputs.items()}
    inputs["img_ids"] = torch.cat([ids, ids + torch.tensor([1.0, 0.0, 0.0])])
    residuals = [torch.zeros(1, tokens, pipe.transformer.inner_dim)]
    handle = parallelize(pipe, window="full")
    with torch.no_grad(), pytest.raises(ValueError, match="ControlNets cannot be combined with reference images"):
        pipe.transformer(**inputs, controlnet_block_samples=residuals)
    with torch.no_grad():
        assert pipe.transformer(**inputs).sample.shape[1] == tokens, "alone they are taken"
    handle.undo()
