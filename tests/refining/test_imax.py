"""I-Max on N ranks against an unmodified pipeline, stage by stage."""

from pathlib import Path
from typing import Any

import numpy as np
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

LOWER, SIZE = (64, 80), (112, 208)
"""7 x 13 tokens, and 8 x 14 half a token off: 1 x 3 blocks of 4 x 4 and more, and 2 x 3."""
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
    ("size", "refinement", "kind", "cut"),
    [
        (1, "imax:constant", "constant", "rows"),
        (2, "imax", "cosine_decay", "columns"),
        (3, "imax", "cosine_decay", "rows"),
    ],
)
def test_n_ranks_are_an_unmodified_pipeline(size: int, refinement: str, kind: str, cut: str) -> None:
    """Each image token sees the copy of its block; of 8 rows on 3 ranks the second one's are in two bands of blocks."""
    found = run_ranks(drawn, size, stages(refinement), cut=cut, **EXACT)
    wanted = expected(reference(3, copies=True), found, kind=kind)
    assert relative_error(wanted, expected(reference(3), found, kind=kind)) > 1e-3  # a single text
    for rank in found:
        assert relative_error(rank[1][0], wanted) < 1e-4


@pytest.mark.parametrize(
    ("size", "cut", "text_tokens"), [(1, "rows", "auto"), (2, "columns", "sharded"), (3, "rows", "replicated")]
)
def test_full_attention_is_the_official_code(size: int, cut: str, text_tokens: str) -> None:
    """All see all copies; positions are clipped."""
    refined = stages("imax:cosine-shift", ntk="clipped")
    found = run_ranks(drawn, size, refined, cut=cut, window="full", text_tokens=text_tokens)
    wanted = expected(reference(FULL, clips=True, copies=True), found, kind="cosine_shift")
    assert relative_error(wanted, expected(reference(FULL, clips=True), found, kind="cosine_shift")) > 1e-3
    for rank in found:
        assert relative_error(rank[1][0], wanted) < 1e-4


@pytest.mark.parametrize("size", [2, 4])
def test_halves_take_a_pass_of_guidance_each(size: int) -> None:
    """Halves of one stripe and of two: in the first two steps both take both passes, on each of the two grids."""
    negative, guided = "fog over all of it", stages("imax", scale=SCALE)
    found = run_ranks(drawn, size, guided, guidance_ranks=2, negative=negative, **EXACT)
    wanted = expected(reference(3, negative=negative, copies=True), found)
    for rank in found:
        assert relative_error(rank[1][0], wanted) < 1e-4


@pytest.mark.parametrize("size", [1, 2, 3])
def test_patches_stay_where_keys_are_down_sampled(size: int, tmp_path: Path) -> None:
    """A row more of tokens would divide by no factor; 2 x 2 blocks, of which the lower ones are of two of 3 ranks."""
    lower, upper = (64, 64), (128, 160)
    file, pipe = tmp_path / "clear_local_3_down_2.safetensors", make_tiny_pipeline(sample_size=NATIVE)
    make_clear_weights(pipe.transformer, file, down_factor=2)
    load_clear_weights(pipe.transformer, file)
    plain = Reference(pipe, PROMPT, radius=3, theta=100_000.0, copies=True, pooling=load_file(file))
    how: dict[str, Any] = {"clear_weights": str(file), "text_attention": "exact", "cut": "rows"}
    found = run_ranks(drawn, size, stages("imax", lower=lower, size=upper), **how)
    wanted = expected(plain, found, upper, shifts=False)
    for rank in found:
        assert relative_error(rank[1][0], wanted) < 1e-4


def test_patches_and_text_stay_where_halos_may_lag() -> None:
    found = run_ranks(drawn, 2, stages("imax"), schedule="stale", warmup_steps=9, **EXACT)
    assert relative_error(found[1][1][0], expected(reference(3), found, shifts=False)) < 1e-4


@pytest.mark.parametrize(("size", "cut"), [(2, "rows"), (3, "rows"), (2, "columns")])
def test_a_step_sends_halos_text_copies_and_the_join_and_nothing_else(size: int, cut: str) -> None:
    """Bytes by hand: two layers' keys and values, of 2 heads of 16, in float32; 64 channels are joined.

    A copy's 8 tokens go, with their log-sum-exps, to each other rank whose rows touch its block.
    """
    ranks = run_ranks(counted, size, stages("imax"), cut=cut, **EXACT)
    grids = [(8, 14), (7, 13)] * 2
    for rank, mine in enumerate(ranks):
        upper = {name: amounts[-4:] for name, amounts in mine.items() if name != "seconds_waiting"}
        halos, joined, texts = zip(*(by_hand(grid, size, rank, cut) for grid in grids), strict=True)
        assert upper.pop("halo_bytes_sent") == [2 * 2 * 32 * 4 * tokens for tokens in halos]
        assert upper.pop("halo_messages_sent") == [2 * (1 + (0 < rank < size - 1))] * 4
        assert upper.pop("join_bytes") == [64 * 4 * tokens for tokens in joined]
        assert upper.pop("text_bytes_reduced") == [2 * 8 * 2 * (16 + 1) * 4 * copies for copies in texts]
        assert upper.pop("other_bytes")[:-1] == [0] * 3  # the last one's are the VAE's
        assert not any(map(any, upper.values())), upper


def by_hand(grid: tuple[int, int], size: int, rank: int, cut: str) -> tuple[int, int, int]:
    """Tokens in halos that a rank sends, tokens of the longest stripe, and copies that it sends, counting receivers."""
    long, across = grid if cut == "rows" else grid[::-1]
    rows = [list(each) for each in np.array_split(np.arange(long), size)]
    bands = [{min(row // 4, max(1, long // 4) - 1) for row in each} for each in rows]
    halos = sum(min(2, len(rows[rank])) for neighbour in (rank - 1, rank + 1) if 0 <= neighbour < size)
    shared = sum(len(bands[rank] & bands[other]) for other in range(size) if other != rank)
    return across * halos, across * len(rows[0]), max(1, across // 4) * shared
