"""The stale schedule's buffers: how large they are, and what happens where they do not fit."""

from typing import Any

import pytest
import torch

from clear_dist.comm.group import Group
from clear_dist.drawing.generation import generate
from clear_dist.engine import room
from clear_dist.geometry import cut_in_stripes, plan_halos
from clear_dist.options import Refusal
from clear_dist.parallelize import parallelize
from tests.engine.test_stale import STEPS
from tests.ranks import run_ranks
from tests.test_parallelize import HEIGHT, WIDTH, run
from tests.tiny import make_tiny_pipeline


def test_flux_at_8192_pixels_on_8_ranks() -> None:
    """Design, section 8: 94 MB per side and layer for r = 16, 10.8 GB for an inner rank."""
    stripes = cut_in_stripes(512, 8)
    row_bytes = 2 * 512 * 3072 * 2
    received = [
        room.halo_bytes_kept(plan_halos(stripes, rank, 16), row_bytes=row_bytes, layers=57) for rank in range(8)
    ]
    one_side = 15 * row_bytes
    assert one_side == pytest.approx(94e6, rel=0.01)
    assert received == [57 * one_side, *[57 * 2 * one_side] * 6, 57 * one_side]
    assert received[1] == pytest.approx(10.8e9, rel=0.01)
    full = room.halo_bytes_kept(plan_halos(stripes, 3, None), row_bytes=row_bytes, layers=57)
    assert received[1] / full == pytest.approx(1 / 15, rel=0.01)  # a seventeenth of all K and V, own rows included
    assert room.halo_bytes_in_flight(plan_halos(stripes, 3, 16), row_bytes=row_bytes) == 9 * 2 * one_side


def held(group: Group, arguments: dict[str, Any], guided: bool) -> tuple[int, int]:
    pipe = make_tiny_pipeline()
    parallelized = parallelize(pipe, group=group, schedule="stale", warmup_steps=1, **arguments)
    run(pipe, steps=STEPS, **({"negative_prompt": "fog", "true_cfg_scale": 2.0} if guided else {}))
    during = parallelized.stale_buffer_bytes
    parallelized.undo()
    return during, parallelized.stale_buffer_bytes


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_what_is_held_is_what_was_planned_and_the_text(size: int, guided: bool) -> None:
    """Two layers of 2 heads of 16 in float32, 9 text tokens; on 5 ranks halos have several owners."""
    layers, row_bytes = 2 * (1 + guided), 2 * WIDTH * 32 * 4
    stripes = cut_in_stripes(HEIGHT, size)
    text = {"average": 9 * 2 * 16 * 4, "exact": 9 * 2 * (17 + 1) * 4}
    for mode, kept in text.items():
        arguments = {"window": 4, "text_attention": mode}
        for rank, (during, afterwards) in enumerate(run_ranks(held, size, arguments, guided)):
            planned = room.halo_bytes_kept(plan_halos(stripes, rank, 4), row_bytes=row_bytes, layers=layers)
            assert during == (planned + layers * kept if size > 1 else 0)
            assert afterwards == during  # the most that there was, for a report at the end


def too_little(group: Group, free: list[int]) -> list[str]:
    """Only what one rank finds is too little; all are told."""
    room._free_bytes = lambda _: free[group.rank]
    pipe = make_tiny_pipeline()
    parallelized = parallelize(pipe, group=group, window=4, schedule="stale", warmup_steps=0)
    with pytest.raises(ValueError, match="must fit"):  # though the lower stage would
        generate(pipe, "a hill", height=208, width=176, base_resolution=32, max_sequence_length=9)
    assert parallelized.counters.as_dict()["join_bytes"] == []  # nothing was drawn
    messages = []
    with pytest.raises(Refusal) as refused:
        run(pipe)
    messages.append(str(refused.value))
    with pytest.raises(ValueError, match="must fit") as refused:
        parallelized.require_room(13, 11, passes=2, steps=2)
    messages.append(str(refused.value))
    run(pipe, height=6, width=2)
    return messages


def test_buffers_that_do_not_fit_are_refused_on_all_ranks_before_they_are_made() -> None:
    # Halos of 3 rows of 2816 bytes: two layers of them, and 9 on their way out, on each of two ranks of this machine.
    needed = 2 * (2 + 9) * 3 * 2816
    two_passes = 2 * (4 + 9) * 3 * 2816
    for first, second in run_ranks(too_little, 2, [10**9, needed - 1]):
        assert "the stale schedule's buffers must fit in the 0.19 MB free on " in first
        assert f"got {needed / 1e6:.2f} MB; nearest: the sync schedule" in first
        assert f"got {two_passes / 1e6:.2f} MB" in second


def just_enough(group: Group, free: int) -> None:
    room._free_bytes = lambda _: free
    pipe = make_tiny_pipeline()
    parallelize(pipe, group=group, window=4, schedule="stale", warmup_steps=0)
    run(pipe)


def test_what_fits_is_not_refused() -> None:
    run_ranks(just_enough, 2, 2 * (2 + 9) * 3 * 2816)


@pytest.mark.parametrize(("warmup_steps", "steps"), [(STEPS, STEPS), (9, STEPS), (0, 1)])
def test_what_is_all_warm_up_keeps_nothing_and_is_never_refused(warmup_steps: int, steps: int) -> None:
    assert run_ranks(all_warm_up, 2, warmup_steps, steps) == [(0, 1.0)] * 2


def all_warm_up(group: Group, warmup_steps: int, steps: int) -> tuple[int, float]:
    """Bytes held; the share of numbers that are those of the sync schedule."""
    room._free_bytes = lambda _: 0
    drawn = []
    for schedule in ("sync", "stale"):
        pipe = make_tiny_pipeline()
        parallelized = parallelize(pipe, group=group, window=4, schedule=schedule, warmup_steps=warmup_steps)
        drawn.append(run(pipe, steps=steps))
    return parallelized.stale_buffer_bytes, float((drawn[0] == drawn[1]).float().mean())


def test_free_memory_is_told() -> None:
    assert 10**7 < room._free_bytes(torch.device("cpu")) < 10**13
