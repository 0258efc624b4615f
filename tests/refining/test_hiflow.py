"""HiFlow on N ranks against an unmodified pipeline, over three stages."""

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from clear_dist.stages import Sampling, Stage, Upscaling
from tests.ranks import run_ranks
from tests.refining.drawing import drawn, picture_of, reference, relative_error, seed_of
from tests.refining.reference import base, hiflow, noise

SIZES = (64, 80), (112, 144), (176, 208)
UPPER = Upscaling(steps=3, guidance_scale=4.5, strength=1.0, refinement="hiflow")
STAGES = tuple(
    Stage(height=height, width=width, sampling=sampling)
    for (height, width), sampling in zip(SIZES, (Sampling(steps=4), UPPER, replace(UPPER, steps=2)), strict=True)
)


def expected(pictures: list[Any]) -> list[Tensor]:
    """Packed latents of each stage, above the pictures that the ranks have drawn."""
    plain = reference(3)
    latents, levels, kept = base(plain, noise(seed_of(0), SIZES[0]), steps=4, guidance=3.5)
    found = [latents]
    for stage, (steps, alpha) in enumerate(((3, 1.0), (2, 0.25)), start=1):
        target, fresh = plain.encoded(pictures[stage - 1], SIZES[stage]), noise(seed_of(stage), SIZES[stage])
        levels, kept = levels[-steps:], kept[-steps:]
        how: dict[str, Any] = {"levels": levels, "kept": kept, "guidance": 4.5, "alpha": alpha}
        latents, kept = hiflow(plain, target, fresh, **how)
        found.append(latents)
    return [plain.pipe._pack_latents(each, *each.shape) for each in found]


@pytest.mark.parametrize(("size", "first"), [(1, None), (2, None), (3, 1)])
def test_n_ranks_are_an_unmodified_pipeline(size: int, first: int | None) -> None:
    """On 3 ranks the first stage is drawn by one, and what it keeps is shared out."""
    stages = (replace(STAGES[0], ranks=first), *STAGES[1:])
    found = run_ranks(drawn, size, stages, window=3, text_attention="exact")
    wanted = expected([picture_of(found, stage) for stage in (0, 1)])
    for rank in found:
        for (latents, _), each in zip(rank, wanted, strict=True):
            if latents is not None:
                assert relative_error(latents, each) < 1e-4
