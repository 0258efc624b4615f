"""A model runs on another group, with another scheduler or above its native size for a while, and then as before."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from torch import distributed as dist

from clear_dist.comm.group import Group
from clear_dist.engine.extrapolation import Extrapolation
from clear_dist.engine.striped import require_striped
from clear_dist.parallelize import parallelize
from tests.engine.stopping import Stop, stop_in_attention
from tests.engine.test_extrapolation import PAPER, SEED, TEXT, oracle_latents
from tests.ranks import run_ranks
from tests.test_parallelize import HEIGHT, WIDTH, relative_error, run
from tests.tiny import make_scheduler, make_tiny_pipeline

EXACT: dict[str, Any] = {"window": 4, "text_attention": "exact"}


def first_ranks(group: Group, count: int) -> Group | None:
    """On the first ranks a group of them alone; None on the others, which take no part."""
    members = dist.new_group(list(range(count)))
    return Group.create("cpu", process_group=members) if group.rank < count else None


def subgroup_then_all_then_subgroup(group: Group) -> list[tuple[list[tuple[int, int]], float]]:
    """Per stage: the stripes that are told after it, and the error of what it computed."""
    pipe = make_tiny_pipeline()
    parallelized = parallelize(pipe, group=group, **EXACT)
    small = first_ranks(group, 2)
    stages = []
    for stage_group, extrapolation in ((small, None), (group, None), (small, PAPER), (group, PAPER)):
        if stage_group is not None:
            with require_striped(pipe).running(group=stage_group, extrapolation=extrapolation):
                assert parallelized.group is stage_group
                latents = run(pipe, seed=SEED)
            stages.append((parallelized.stripes, relative_error(latents, oracle_latents(4, extrapolation))))
        assert parallelized.group is group
    parallelized.undo()
    return stages


def test_a_subgroup_then_all_ranks_then_the_subgroup_again() -> None:
    on_two = [(0, 7), (7, 13)]
    on_three = [(0, 5), (5, 9), (9, 13)]
    results = run_ranks(subgroup_then_all_then_subgroup, 3)
    for rank, stages in enumerate(results):
        told = [stripes for stripes, _ in stages]
        assert told == ([on_two, on_three, on_two, on_three] if rank < 2 else [on_three, on_three])
        assert max(error for _, error in stages) < 1e-4


def test_a_cut_is_made_anew_only_where_something_has_changed() -> None:
    pipe = make_tiny_pipeline()
    parallelized = parallelize(pipe, **EXACT)
    striped = require_striped(pipe)
    try:
        run(pipe, steps=1)
        native = striped.cut
        run(pipe, steps=1, seed=8)
        assert striped.cut is native
        with striped.running(scheduler=pipe.scheduler, group=parallelized.group):
            run(pipe, steps=1)
        assert striped.cut is native
        with striped.running(extrapolation=PAPER):
            run(pipe, steps=1)
            extrapolated = striped.cut
            assert extrapolated is not native
            run(pipe, steps=1)
            assert striped.cut is extrapolated
            run(pipe, steps=1, height=WIDTH, width=HEIGHT)
            assert striped.cut is not extrapolated
            assert parallelized.grid == (WIDTH, HEIGHT)
            run(pipe, steps=1)
            extrapolated = striped.cut
        with striped.running(extrapolation=Extrapolation(native_tokens=20, ntk_factor=10.0)):
            run(pipe, steps=1)
            assert striped.cut is extrapolated
        run(pipe, steps=1)
        assert striped.cut is not extrapolated
    finally:
        parallelized.undo()


def stopped_in_the_middle(group: Group) -> list[float]:
    """An exception between two layers on the subgroup, then all ranks as ever."""
    pipe = make_tiny_pipeline()
    parallelized = parallelize(pipe, group=group, **EXACT)
    striped = require_striped(pipe)
    stock, scheduler = pipe.transformer.pos_embed, striped.scheduler
    small = first_ranks(group, 2)

    def stop(*_: Any) -> None:
        raise Stop

    if small is not None:
        hook = pipe.transformer.single_transformer_blocks[0].register_forward_pre_hook(stop)
        other = make_scheduler(dynamic_shifting=False)
        other.set_timesteps(3)
        with pytest.raises(Stop), striped.running(group=small, scheduler=other, extrapolation=PAPER):
            run(pipe)
        hook.remove()
    assert pipe.transformer.pos_embed is stock
    assert (striped.group, striped.scheduler, striped.extrapolation) == (group, scheduler, None)
    errors = [relative_error(run(pipe, seed=SEED), oracle_latents(4, None))]
    with striped.running(extrapolation=PAPER):
        errors.append(relative_error(run(pipe, seed=SEED), oracle_latents(4, PAPER)))
    parallelized.undo()
    return errors


def test_everything_is_restored_after_an_exception() -> None:
    for errors in run_ranks(stopped_in_the_middle, 3):
        assert max(errors) < 1e-4


def stopped_in_a_layer(group: Group) -> float:
    """Its halos were sent and are not waited for."""
    pipe = make_tiny_pipeline()
    parallelized = parallelize(pipe, group=group, **EXACT)
    stop_in_attention(pipe, 3)
    with pytest.raises(Stop):
        run(pipe)
    latents = run(pipe, seed=SEED)
    parallelized.undo()
    return relative_error(latents, oracle_latents(4, None))


@pytest.mark.parametrize("size", [1, 2])
def test_a_forward_that_broke_off_leaves_nothing_behind(size: int) -> None:
    assert max(run_ranks(stopped_in_a_layer, size)) < 1e-4


def test_running_can_be_nested() -> None:
    pipe = make_tiny_pipeline()
    parallelized = parallelize(pipe, **EXACT)
    striped = require_striped(pipe)
    twice = Extrapolation(native_tokens=20, ntk_factor=2)
    try:
        with striped.running(extrapolation=PAPER):
            with striped.running(extrapolation=twice):
                assert pipe.transformer.pos_embed.theta == 20_000
            assert pipe.transformer.pos_embed.theta == 100_000
            with striped.running(scheduler=make_scheduler()):
                assert (striped.extrapolation, pipe.transformer.pos_embed.theta) == (PAPER, 100_000)
        assert pipe.transformer.pos_embed.theta == 10_000
    finally:
        parallelized.undo()


def require_stock(pipe: FluxPipeline) -> None:
    assert pipe.transformer.pos_embed.theta == 10_000
    assert torch.equal(run(pipe, steps=1), run(make_tiny_pipeline(), steps=1))


def test_undo_inside_restores_the_stock_pipeline() -> None:
    pipe = make_tiny_pipeline()
    parallelized = parallelize(pipe, **EXACT)
    striped = require_striped(pipe)
    with striped.running(extrapolation=PAPER):
        with striped.running(extrapolation=Extrapolation(native_tokens=5)):
            parallelized.undo()
            require_stock(pipe)
        require_stock(pipe)
    require_stock(pipe)


def undo_on_the_subgroup(group: Group) -> bool:
    """`undo` closes the group that `parallelize` made, not the one that the model runs on at the time."""
    pipe = make_tiny_pipeline()
    parallelized = parallelize(pipe, **EXACT)
    small = first_ranks(group, 1)
    if small is None:
        parallelized.undo()
        return True
    with require_striped(pipe).running(group=small):
        run(pipe, steps=1)
        parallelized.undo()
    return small.equal([7])


def test_undo_inside_leaves_the_subgroup_to_who_made_it() -> None:
    assert run_ranks(undo_on_the_subgroup, 2) == [True, True]


def one_step_more_on_rank_1(group: Group) -> None:
    pipe = make_tiny_pipeline()
    parallelize(pipe, window=4, group=group)
    with (
        require_striped(pipe).running(scheduler=SimpleNamespace(timesteps=range(3 + group.rank))),
        pytest.raises(ValueError, match="same number of steps, got 3, 4"),
    ):
        run(pipe)


def test_the_steps_compared_are_those_of_the_other_scheduler() -> None:
    run_ranks(one_step_more_on_rank_1, 2)


def same_inputs_inside_and_outside(pipe: FluxPipeline) -> list[torch.Tensor]:
    """The model's outputs for the very same tensors: before, inside and after."""
    generator = torch.Generator().manual_seed(SEED)
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    inputs = {
        "hidden_states": torch.randn(1, HEIGHT * WIDTH, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, TEXT, 24, generator=generator),
        "pooled_projections": torch.randn(1, 16, generator=generator),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3).float(),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    pipe.scheduler.set_timesteps(3, mu=1.0)
    before = pipe.transformer(**inputs).sample
    with require_striped(pipe).running(extrapolation=Extrapolation(native_tokens=20)):
        inside = pipe.transformer(**inputs).sample
    return [before, inside, pipe.transformer(**inputs).sample]


def test_the_same_tensors_are_another_generation_inside() -> None:
    pipe = make_tiny_pipeline()
    parallelized = parallelize(pipe, **EXACT)
    try:
        before, inside, after = same_inputs_inside_and_outside(pipe)
    finally:
        parallelized.undo()
    assert relative_error(inside, before) > 1e-2
    assert torch.equal(before, after)
