"""The stale schedule on N ranks: against an emulation in one process, and against the sync schedule."""

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.parallelize import parallelize
from tests.ranks import run_ranks
from tests.stale_oracle import emulate
from tests.test_parallelize import HEIGHT, WIDTH, relative_error, run
from tests.tiny import make_tiny_pipeline

STEPS = 4
ATTENTION: tuple[dict[str, Any], ...] = (
    {"window": 4, "text_attention": "average"},
    {"window": 4, "text_attention": "exact"},
    {"window": "full", "cut": "rows"},
)


def stale_latents(group: Group, cases: list[dict[str, Any]]) -> list[Tensor]:
    """On a rank: latents of each case, all with one pipeline."""
    # Fills what torch.empty returns with NaN.
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    pipe = make_tiny_pipeline()
    results = []
    for case in cases:
        parallelized = parallelize(pipe, group=group, **case)
        results.append(run(pipe, steps=STEPS))
        parallelized.undo()
    return results


@cache
def emulated(window: int | str, text_attention: str, warmup: int, ranks: int, by_columns: bool = False) -> Tensor:
    pipe = make_tiny_pipeline()
    emulate(
        pipe,
        height=HEIGHT,
        width=WIDTH,
        window=window,
        ranks=ranks,
        average=text_attention == "average",
        warmup=warmup,
        by_columns=by_columns,
    )
    return run(pipe, steps=STEPS)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_stale_is_what_one_process_computes_with_late_neighbours(size: int) -> None:
    """On 5 ranks stripes are thinner than the halo. One rank has no neighbours: it is in sync."""
    cases = [(attention, warmup) for attention in ATTENTION for warmup in (0, 1, 2)]
    cases += [(attention | {"cut": "columns"}, 1) for attention in ATTENTION]
    arguments = [{**attention, "schedule": "stale", "warmup_steps": warmup} for attention, warmup in cases]
    for rank_results in run_ranks(stale_latents, size, arguments):
        for latents, (attention, warmup) in zip(rank_results, cases, strict=True):
            window, mode = attention["window"], attention.get("text_attention", "exact")
            by_columns = size > 1 and attention.get("cut") == "columns"
            in_sync = emulated(window, mode, STEPS, size, by_columns)
            late = in_sync if size == 1 else emulated(window, mode, warmup, size, by_columns)
            assert relative_error(latents, late) < 1e-4
            assert size == 1 or relative_error(latents, in_sync) > 1e-3


@pytest.mark.parametrize("size", [2, 5])
def test_a_warm_up_of_all_steps_is_the_sync_schedule_to_the_bit(size: int) -> None:
    sync = [{**attention, "schedule": "sync"} for attention in ATTENTION]
    stale = [{**attention, "schedule": "stale", "warmup_steps": STEPS} for attention in ATTENTION]
    for results in run_ranks(stale_latents, size, sync + stale):
        for before, after in zip(results[: len(sync)], results[len(sync) :], strict=True):
            assert torch.equal(before, after)


def test_two_runs_and_all_ranks_agree_to_the_bit() -> None:
    cases = [{**attention, "schedule": "stale", "warmup_steps": 1} for attention in ATTENTION]
    first, second = (run_ranks(stale_latents, 3, cases) for _ in range(2))
    for results in zip(*first, *second, strict=True):
        assert all(torch.equal(result, results[0]) for result in results)


GUIDED: dict[str, Any] = {"negative_prompt": "fog", "true_cfg_scale": 2.0, "num_images_per_prompt": 2, "steps": STEPS}
STARTED: dict[str, Any] = {"height": 16 * 9, "width": 16 * 6, "strength": 0.8, "num_inference_steps": 5}


def edited(pipe: Any) -> Tensor:
    """Image-to-image: four of five steps."""
    from_picture = FluxImg2ImgPipeline.from_pipe(pipe)
    from_picture.set_progress_bar_config(disable=True)
    return from_picture(
        prompt="a hill",
        image=torch.rand(1, 3, 16 * 9, 16 * 6, generator=torch.Generator().manual_seed(0)),
        max_sequence_length=5,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        **STARTED,
    ).images


def guided_then_edited(group: Group, attention: dict[str, Any]) -> tuple[Tensor, Tensor]:
    pipe = make_tiny_pipeline()
    parallelize(pipe, group=group, schedule="stale", warmup_steps=2, **attention)
    return run(pipe, **GUIDED), edited(pipe)


@pytest.mark.parametrize("attention", ATTENTION, ids=["average", "exact", "full"])
def test_two_passes_of_two_pictures_and_a_start_from_a_picture(attention: dict[str, Any]) -> None:
    pipe = make_tiny_pipeline()
    common: dict[str, Any] = {
        "window": attention["window"],
        "ranks": 3,
        "average": attention.get("text_attention") == "average",
        "warmup": 2,
    }
    emulate(pipe, height=HEIGHT, width=WIDTH, passes=2, **common)
    guided = run(pipe, **GUIDED)
    emulate(pipe, height=9, width=6, **common)
    started = edited(pipe)
    for results in run_ranks(guided_then_edited, 3, attention):
        assert relative_error(results[0], guided) < 1e-4
        assert relative_error(results[1], started) < 1e-4


def counted(group: Group, case: dict[str, Any]) -> tuple[dict[str, list[Any]], int]:
    pipe = make_tiny_pipeline()
    parallelized = parallelize(pipe, group=group, **case)
    run(pipe, steps=STEPS)
    return parallelized.counters.as_dict(), parallelized.stale_buffer_bytes


@pytest.mark.parametrize("size", [2, 5])
def test_as_many_messages_and_bytes_as_in_sync_and_one_reduction_a_layer(size: int) -> None:
    """Two layers of 2 heads of 16 in float32, 9 text tokens."""
    text = 2 * 9 * 2 * 4
    per_step = {"average": (16, 16), "exact": (1 + 17, 17)}  # maximum, output and weight; the maximum is spared
    for attention in ATTENTION[:2]:
        late = run_ranks(counted, size, {**attention, "schedule": "stale", "warmup_steps": 2})
        for (sync, nothing), (stale, held) in zip(run_ranks(counted, size, attention), late, strict=True):
            for name in ("halo_messages_sent", "halo_bytes_sent", "join_bytes"):
                assert stale[name] == sync[name]
            warm, lagging = (text * numbers for numbers in per_step[attention["text_attention"]])
            assert stale["text_bytes_reduced"] == [warm, warm, lagging, lagging]
            assert nothing == 0 < held


def test_full_attention_reduces_its_text_once_it_is_stale() -> None:
    text = 2 * 9 * 2 * 4
    for stale, _ in run_ranks(counted, 2, {"window": "full", "schedule": "stale", "warmup_steps": 2}):
        assert stale["text_bytes_reduced"] == [0, 0, text * 18, text * 17]
