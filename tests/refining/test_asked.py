"""What a way of refining makes of a request, and what cannot be asked of it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import clear_dist
from clear_dist.families.cards import CARDS
from clear_dist.options import Refusal
from clear_dist.refining import REFINEMENTS, Guide, Step
from clear_dist.refining.low_pass import low_pass
from clear_dist.request.flags import GenerateFlags, UpscaleFlags
from clear_dist.request.request import Request
from clear_dist.request.settle import settle
from clear_dist.stages import Sampling, Upscaling, check_refining, plan_cascade
from tests.refining.reference import haar
from tests.request.test_pictures import ALONE, here, model, picture

__all__ = ["here", "model"]


def settled(model: Path, **given: Any) -> Request:
    return settle(GenerateFlags(model=str(model), device="cpu", prompt="a hill", **given), ALONE, CARDS)[0]


@pytest.mark.parametrize(
    ("refine", "steps", "strength"),
    [("sdedit", [10, 7, 7], 0.7), ("imax", [10, 10, 10], 1.0), ("imax:constant", [10, 10, 10], 1.0),
     ("hiflow", [10, 5, 3], 1.0)],
)  # fmt: skip
def test_a_way_has_usual_steps(model: Path, refine: str, steps: list[int], strength: float) -> None:
    """30, 16 and 10 in HiFlow's paper."""
    request = settled(model, res=512, steps=10, refine=refine)
    assert [stage.sampling.steps for stage in request.stages] == steps
    assert request.upscaling.strength == strength and request.upscaling.refinement == refine


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"res": 128, "refine": "imax"}, "--refine: .*above the native one, got imax for 128 x 128 px in one stage"),
        ({"res": 256, "refine": "imax", "upscale_steps": 7}, "even number of steps, got 7; nearest: 8"),
        ({"res": 256, "refine": "imax", "strength": 0.5}, "--strength is for --refine sdedit, got 0.5 for imax"),
        ({"res": 256, "refine": "hiflow", "steps": 4, "upscale_steps": 5}, "which has 4, got 5; nearest: 4"),
        ({"res": 256, "refine": "imagine"}, "--refine must be one of sdedit, imax, .* got 'imagine'"),
        ({"res": 256, "ntk": "yarn"}, "--ntk must be one of plain, clipped, got 'yarn'"),
    ],
)
def test_what_cannot_be(model: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        settled(model, **given)


def test_a_picture_of_the_users_has_no_steps_to_go_by(model: Path) -> None:
    flags = UpscaleFlags(model=str(model), device="cpu", images=[str(picture(64, 64))], res=256, refine="hiflow")
    with pytest.raises(Refusal, match="goes by the steps of a stage below, got a picture; nearest: sdedit"):
        settle(flags, ALONE, CARDS)


def test_python_is_refused_alike() -> None:
    with pytest.raises(ValueError, match=r"refinement must be one of sdedit, .* got 'imagine'"):
        Upscaling(refinement="imagine")
    with pytest.raises(ValueError, match="imax takes an even number of steps, got 5; nearest: 6"):
        Upscaling(refinement="imax", steps=5)
    how: dict[str, Any] = {"native": 64, "token": 16, "sampling": Sampling(), "upscaling": Upscaling()}
    with pytest.raises(ValueError, match="for sizes above the native one, got imax for 64 x 64 px"):
        check_refining(plan_cascade((64, 64), **how), "imax")
    assert "refinement" in clear_dist.generate.__annotations__ and "refinement" in clear_dist.upscale.__annotations__


def test_low_frequencies_are_haars() -> None:
    latents = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(low_pass(latents), haar(latents), atol=1e-6)


def test_guidance_fades() -> None:
    """A constant picture has low frequencies only: they are led by 1 + cos(pi i / N), halved, or wholly."""
    like = torch.zeros(1, 1, 2, 2)
    guide, sigma = Guide(target=like + 3), torch.tensor(0.5)
    for index, share in enumerate((1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125))):
        step = Step(index=index, count=4, sigma=sigma, latents=like + 1)
        led = REFINEMENTS["imax"].velocity(like + 2, step, guide, None)[0]
        assert torch.allclose(led, like + 2 + share * (-4 - 2), atol=1e-4)
        whole = REFINEMENTS["imax:constant"].velocity(like + 2, step, guide, None)[0]
        assert torch.allclose(whole, like - 4, atol=1e-4)
