"""I-Max on N ranks against an unmodified pipeline, stage by stage."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from clear_dist.stages import Sampling, Size, Stage, Upscaling
from clear_dist.weights.clear import load_clear_weights
from tests.ranks import run_ranks
from tests.refining.drawing import (
    PROMPT,
    Drawn,
    counted,
    drawn,
    picture_of,
    reference,
    relative_error,
    seed_of,
)
from tests.refining.reference import FULL, NATIVE, SCALE, Reference, imax, noise
from tests.tiny import make_clear_weights, make_tiny_pipeline

LOWER, SIZE = (64, 80), (112, 144)
"""7 x 9 tokens, and 8 x 10 half a token off."""
EXACT: dict[str, Any] = {"window": 3, "text_attention": "exact"}


def stages(
    refinement: str, *, scale: float = 1.0, lower: Size = LOWER, size: Size = SIZE, **how: Any
) -> tuple[Stage, Stage]:
    guided: dict[str, Any] = {"true_cfg_scale": scale, "guidance_scale": 7.0}
    upper = Upscaling(steps=4, strength=1.0, refinement=refinement, **guided, **how)
    return (
        Stage(height=lower[0], width=lower[1], sampling=Sampling(steps=2, true_cfg_scale=scale)),
        Stage(height=size[0], width=size[1], sampling=upper),
    )


def expected(plain: Reference, found: list[Drawn], size: Size = SIZE, kind: str = "cosine_decay", **how: Any) -> Tensor:
    """Packed latents of the upper stage, above the picture that the ranks have drawn."""
    target = plain.encoded(picture_of(found, 0), size)
    latents = imax(plain, target, noise(seed_of(1), size), steps=4, guidance=7.0, kind=kind, **how)
    return plain.pipe._pack_latents(latents, *latents.shape)


@pytest.mark.parametrize(
    ("size", "refinement", "kind", "window"),
    [
        (1, "imax:constant", "constant", 3),
        (2, "imax:cosine-shift", "cosine_shift", "full"),
        (2, "imax", "cosine_decay", 3),
        (3, "imax", "cosine_decay", 3),
    ],
)
def test_n_ranks_are_the_official_code(size: int, refinement: str, kind: str, window: int | str) -> None:
    """On 2 ranks stripes are of columns; positions are clipped where the window is full."""
    clips = window == "full"
    how: dict[str, Any] = {"window": "full"} if clips else EXACT
    cut = "columns" if size == 2 else "rows"
    found = run_ranks(drawn, size, stages(refinement, ntk="clipped" if clips else "plain"), cut=cut, **how)
    wanted = expected(reference(FULL if isinstance(window, str) else window, clips=clips), found, kind=kind)
    for rank in found:
        assert relative_error(rank[1][0], wanted) < 1e-4


@pytest.mark.parametrize("size", [2, 4])
def test_halves_take_a_pass_of_guidance_each(size: int) -> None:
    """Halves of one stripe and of two: in the first two steps both take both passes, on each of the two grids."""
    negative, guided = "fog over all of it", stages("imax", scale=SCALE)
    found = run_ranks(drawn, size, guided, guidance_ranks=2, negative=negative, **EXACT)
    wanted = expected(reference(3, negative=negative), found)
    for rank in found:
        assert relative_error(rank[1][0], wanted) < 1e-4


@pytest.mark.parametrize("size", [1, 2])
def test_patches_stay_where_keys_are_down_sampled(size: int, tmp_path: Path) -> None:
    """A row more of tokens would divide by no factor."""
    lower, upper = (64, 64), (96, 128)
    file, pipe = tmp_path / "clear_local_3_down_2.safetensors", make_tiny_pipeline(sample_size=NATIVE)
    make_clear_weights(pipe.transformer, file, down_factor=2)
    load_clear_weights(pipe.transformer, file)
    plain = Reference(pipe, PROMPT, radius=3, theta=100_000.0, pooling=load_file(file))
    how: dict[str, Any] = {"clear_weights": str(file), "text_attention": "exact", "cut": "rows"}
    found = run_ranks(drawn, size, stages("imax", lower=lower, size=upper), **how)
    wanted = expected(plain, found, upper, shifts=False)
    for rank in found:
        assert relative_error(rank[1][0], wanted) < 1e-4


def test_patches_stay_where_halos_may_lag() -> None:
    found = run_ranks(drawn, 2, stages("imax"), schedule="stale", warmup_steps=9, **EXACT)
    assert relative_error(found[1][1][0], expected(reference(3), found, shifts=False)) < 1e-4


def test_a_step_sends_halos_text_and_the_join_and_nothing_else() -> None:
    """Bytes by hand: two layers' keys and values, of 2 heads of 16, in float32; 64 channels are joined."""
    ranks = run_ranks(counted, 2, stages("imax"), cut="rows", text_tokens="replicated", **EXACT)
    as_is = run_ranks(counted, 2, stages("sdedit"), cut="rows", text_tokens="replicated", **EXACT)
    for mine, theirs in zip(ranks, as_is, strict=True):
        upper = {name: amounts[-4:] for name, amounts in mine.items() if name != "seconds_waiting"}
        assert upper.pop("halo_bytes_sent") == [2 * 2 * 2 * 32 * 4 * width for width in (10, 9, 10, 9)]
        assert upper.pop("halo_messages_sent") == [2] * 4
        assert upper.pop("join_bytes") == [4 * 64 * 4 * width for width in (10, 9, 10, 9)]
        assert upper.pop("text_bytes_reduced") == theirs["text_bytes_reduced"][-4:]
        assert upper.pop("other_bytes")[:-1] == [0] * 3  # the last one's are the VAE's
        assert not any(map(any, upper.values())), upper
