"""I-Max on N ranks against an unmodified pipeline, stage by stage."""

from typing import Any

import pytest

from clear_dist.stages import Sampling, Stage, Upscaling
from tests.ranks import run_ranks
from tests.refining.drawing import drawn, picture_of, reference, relative_error, seed_of
from tests.refining.reference import FULL, imax, noise

LOWER, SIZE = (64, 80), (112, 144)
"""7 x 9 tokens, and 8 x 10 half a token off."""


def stages(refinement: str, **settings: Any) -> tuple[Stage, Stage]:
    upper = Upscaling(steps=4, guidance_scale=7.0, strength=1.0, refinement=refinement, **settings)
    return (
        Stage(height=LOWER[0], width=LOWER[1], sampling=Sampling(steps=2)),
        Stage(height=SIZE[0], width=SIZE[1], sampling=upper),
    )


@pytest.mark.parametrize(
    ("size", "refinement", "kind", "window"),
    [
        (1, "imax:cosine-shift", "cosine_shift", "full"),
        (1, "imax:constant", "constant", 3),
        (2, "imax", "cosine_decay", 3),
        (2, "imax", "cosine_decay", "full"),
        (3, "imax", "cosine_decay", 3),
    ],
)
def test_n_ranks_are_the_official_code(size: int, refinement: str, kind: str, window: int | str) -> None:
    """On 2 ranks stripes are of columns; positions are clipped where the window is full."""
    clips = window == "full"
    exact: dict[str, Any] = {} if window == "full" else {"text_attention": "exact"}
    how: dict[str, Any] = {"window": window, "cut": "columns" if size == 2 else "rows"}
    found = run_ranks(drawn, size, stages(refinement, ntk="clipped" if clips else "plain"), **how, **exact)
    plain = reference(FULL if isinstance(window, str) else window, clips=clips)
    target = plain.encoded(picture_of(found, 0), SIZE)
    expected = imax(plain, target, noise(seed_of(1), SIZE), steps=4, guidance=7.0, kind=kind)
    packed = plain.pipe._pack_latents(expected, *expected.shape)
    for rank in found:
        assert relative_error(rank[1][0], packed) < 1e-4


def drawn_with_lag(group: Any) -> Any:
    return drawn(group, stages("imax"), window=3, text_attention="exact", schedule="stale", warmup_steps=9)


def test_patches_stay_where_halos_may_lag() -> None:
    found = run_ranks(drawn_with_lag, 2)
    plain = reference(3)
    target = plain.encoded(picture_of(found, 0), SIZE)
    expected = imax(plain, target, noise(seed_of(1), SIZE), steps=4, guidance=7.0, kind="cosine_decay", shifts=False)
    assert relative_error(found[1][1][0], plain.pipe._pack_latents(expected, *expected.shape)) < 1e-4
