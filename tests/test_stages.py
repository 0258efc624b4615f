"""At which sizes a cascade draws: properties that hold for any request."""

from itertools import pairwise
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clear_dist.stages import (
    Sampling,
    Size,
    Stage,
    Upscaling,
    base_size,
    plan_cascade,
    plan_upscaling,
    sizes_up_to,
)

SIDES = st.integers(1, 1024).map(lambda tokens: 16 * tokens)
NATIVES = st.sampled_from([128, 256, 512, 1024])


def planned(size: Size, native: int, **changes: bool) -> tuple[Stage, ...]:
    return plan_cascade(size, native=native, token=16, sampling=Sampling(), upscaling=Upscaling(), **changes)


@given(st.tuples(SIDES, SIDES), NATIVES)
def test_a_cascade_grows_by_whole_tokens_and_at_most_about_twice(size: Size, native: int) -> None:
    stages = planned(size, native)
    assert stages[-1].size == size
    assert [isinstance(stage.sampling, Upscaling) for stage in stages] == [False] + [True] * (len(stages) - 1)
    for lower, upper in pairwise(stages):
        assert upper.size != lower.size
        for old, new in zip(lower.size, upper.size, strict=True):
            assert old % 16 == new % 16 == 0
            # 2.14, and half a token of rounding on either side
            assert old - 8 <= new <= 2.15 * (old + 8) + 8


@given(st.tuples(SIDES, SIDES), NATIVES)
def test_the_first_stage_has_the_native_number_of_pixels_in_the_same_shape(size: Size, native: int) -> None:
    height, width = base_size(size, native=native, token=16)
    assert height <= size[0] and width <= size[1]
    if size[0] * size[1] <= native * native:
        assert (height, width) == size
    elif min(height, width) > native // 2 + 16:  # no sliver
        assert abs(sqrt(height * width) - native) <= 16 + native * 16 / min(height, width)
        assert abs(height - width * size[0] / size[1]) <= 8 + 8 * size[0] / size[1]


@pytest.mark.parametrize(
    ("size", "native", "expected"),
    [
        ((8192, 8192), 256, [256, 512, 1024, 2048, 4096, 8192]),
        ((8192, 8192), 1024, [1024, 2048, 4096, 8192]),
        ((3072, 3072), 1024, [1024, 1776, 3072]),
        ((1024, 1024), 1024, [1024]),
        ((512, 512), 1024, [512]),
    ],
)
def test_squares(size: Size, native: int, expected: list[int]) -> None:
    assert [stage.size for stage in planned(size, native)] == [(side, side) for side in expected]


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.5, float("nan")])
def test_strengths_that_mean_nothing_are_refused(strength: float) -> None:
    with pytest.raises(ValueError, match="strength must be above 0 and at most 1, got"):
        Upscaling(strength=strength)


def test_a_stage_has_a_step() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Upscaling(steps=0)


def test_without_a_cascade_there_is_one_stage() -> None:
    assert [stage.size for stage in planned((4096, 2048), 256, cascade=False)] == [(4096, 2048)]


@pytest.mark.parametrize(
    ("picture", "size", "expected"),
    [
        ((512, 512), (2048, 2048), [(1024, 1024), (2048, 2048)]),
        ((100, 60), (1024, 608), [(336, 192), (592, 336), (1024, 608)]),
        ((1024, 1024), (1024, 1024), [(1024, 1024)]),
    ],
)
def test_a_picture_is_refined_from_its_own_size_or_the_native_one(
    picture: Size, size: Size, expected: list[Size]
) -> None:
    stages = plan_upscaling(picture, size, native=256, token=16, upscaling=Upscaling())
    assert [stage.size for stage in stages] == expected


@given(st.tuples(SIDES, SIDES))
def test_nothing_is_left_to_do_at_the_size_itself(size: Size) -> None:
    assert sizes_up_to(size, start=size, token=16) == ()


def test_a_refinement_takes_the_steps_of_the_notebook() -> None:
    """The notebook asks diffusers for 20 at a strength of 0.7."""
    assert (Upscaling().steps, Upscaling().strength, Upscaling().guidance_scale) == (14, 0.7, 7.5)
