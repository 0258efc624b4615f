"""N ranks against the unmodified pipeline, and against an oracle written apart from the engine."""

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import ZImageImg2ImgPipeline
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.parallelize import parallelize
from tests.families.z_image.oracle import Dense, put
from tests.families.z_image.tiny import make_tiny_z_image
from tests.ranks import run_ranks
from tests.stale_oracle import stripes_of
from tests.test_parallelize import relative_error

PADDED, WHOLE = (13, 11), (8, 12)
"""Sizes in tokens: rows that 2, 3 and 5 ranks do not divide, 17 tokens of padding; and none, 8 rows for 5 ranks."""
PROMPT, NEGATIVE = "a lighthouse at dusk, its light over a calm sea", "fog"
"""64 places and 32, so that guidance masks those of the shorter one."""


def run(
    pipe: Any, size: tuple[int, int], *, guidance: float = 0.0, seed: int = 7, steps: int = 3, **named: Any
) -> Tensor:
    """Latents after the last step."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        **({"prompt": PROMPT, "negative_prompt": NEGATIVE} | named),
        height=16 * size[0],
        width=16 * size[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).images


CASES: list[dict[str, Any]] = [
    {"size": PADDED},
    {"size": WHOLE},
    {"size": PADDED, "guidance": 3.0},
    {"size": WHOLE, "guidance": 3.0},
]


def on_stripes(group: Group, settings: list[dict[str, Any]]) -> list[list[Tensor]]:
    """Latents of each case under each of the settings, all with one pipeline."""
    pipe, drawn = make_tiny_z_image(), []
    for options in settings:
        handle = parallelize(pipe, group=group, **options)
        drawn.append([run(pipe, **case) for case in CASES])
        handle.undo()
    assert torch.equal(run(pipe, PADDED), stock()[0]), "stock again"
    return drawn


@cache
def stock() -> list[Tensor]:
    pipe = make_tiny_z_image()
    return [run(pipe, **case) for case in CASES]


@cache
def oracle(radius: int, ranks: int | None = None) -> list[Tensor]:
    """From the unmodified transformer; `ranks`: of Eq. 7, None: exact text attention. The wider picture has columns."""
    pipe, drawn = make_tiny_z_image(), []
    for case in CASES:
        wide = case["size"] == WHOLE
        parts = None if ranks is None else stripes_of(max(case["size"]), ranks)
        put(pipe, Dense, *case["size"], radius, parts, by_columns=wide)
        drawn.append(run(pipe, **case))
    return drawn


@pytest.mark.parametrize("size", [1, 2, 3])
def test_full_attention_is_the_stock_pipeline(size: int) -> None:
    settings = [{"window": "full"}, {"window": "full", "text_tokens": "sharded"}, {"window": "full", "cut": "columns"}]
    for ranks in run_ranks(on_stripes, size, settings):
        for latents in ranks:
            for found, expected in zip(latents, stock(), strict=True):
                assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_windows_do_not_depend_on_the_number_of_ranks(size: int) -> None:
    radii = (1, 4, 1000)
    settings = [{"window": radius, "text_attention": "exact"} for radius in radii]
    settings.append({"window": 4, "text_attention": "exact", "text_tokens": "sharded"})
    settings.append({"window": 4, "text_attention": "exact", "cut": "columns"})
    for ranks in run_ranks(on_stripes, size, settings):
        for radius, latents in zip((*radii, 4, 4), ranks, strict=True):
            for found, expected in zip(latents, oracle(radius), strict=True):
                assert relative_error(found, expected) < 1e-4
    assert relative_error(oracle(4)[0], stock()[0]) > 1e-2, "the window matters"


@pytest.mark.parametrize("size", [1, 2, 5])
def test_average_is_equation_7(size: int) -> None:
    for (latents,) in run_ranks(on_stripes, size, [{"window": 4}]):
        for found, expected, exact in zip(latents, oracle(4, size), oracle(4), strict=True):
            assert relative_error(found, expected) < 1e-4
            assert size == 1 or relative_error(found, exact) > 1e-3


def features(group: Group | None) -> list[Tensor]:
    """A batch of prompts of two lengths, the same embeddings at two sizes, image-to-image: one pipeline."""
    pipe = make_tiny_z_image()
    if group is not None:
        parallelize(pipe, group=group, window="full")
    batch = run(pipe, PADDED, prompt=[PROMPT, "fog"], negative_prompt=None, num_images_per_prompt=2)
    given = {"prompt": None, "negative_prompt": None, "prompt_embeds": pipe.encode_prompt(PROMPT)[0]}
    again = [run(pipe, size, **given) for size in (WHOLE, PADDED)]
    from_picture = ZImageImg2ImgPipeline.from_pipe(pipe)
    from_picture.set_progress_bar_config(disable=True)
    edited = from_picture(
        PROMPT,
        image=torch.rand(1, 3, 16 * PADDED[0], 16 * PADDED[1], generator=torch.Generator().manual_seed(0)),
        strength=0.7,
        num_inference_steps=4,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images
    return [batch, *again, edited]


def test_stock_features_on_one_pipeline_object() -> None:
    expected = features(None)
    for results in run_ranks(features, 3):
        for found, stock_latents in zip(results, expected, strict=True):
            assert relative_error(found, stock_latents) < 1e-4


TRUNCATED = {"size": PADDED, "guidance": 3.0, "steps": 4, "cfg_truncation": 0.3}
"""Guidance, and with it half of the batch, ends before the last step."""


def truncated(group: Group, warmup_steps: int) -> Tensor:
    pipe = make_tiny_z_image()
    parallelize(pipe, group=group, window=4, text_attention="exact", schedule="stale", warmup_steps=warmup_steps)
    return run(pipe, **TRUNCATED)


@pytest.mark.parametrize("size", [2, 3])
def test_a_step_after_the_end_of_guidance_has_halos_of_its_own(size: int) -> None:
    """Those of the step before are of a batch of two; only the last step would lag, or two before it, too."""
    pipe = make_tiny_z_image()
    put(pipe, Dense, *PADDED, 4, None)
    expected = run(pipe, **TRUNCATED)
    for latents in run_ranks(truncated, size, 3):
        assert relative_error(latents, expected) < 1e-4
    for latents in run_ranks(truncated, size, 1):
        assert relative_error(latents, expected) > 1e-3
