"""One pipeline object, one generation after another in the stale schedule: each equals that of a fresh process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import clear_dist
from clear_dist.comm.group import Group
from clear_dist.engine.striped import require_striped
from clear_dist.parallelize import interrupt, parallelize
from clear_dist.stages import Upscaling
from tests.engine.stopping import Stop, stop_in_attention
from tests.engine.test_stale import ATTENTION, GUIDED, STEPS, edited
from tests.ranks import run_ranks
from tests.test_parallelize import relative_error, run
from tests.tiny import make_tiny_pipeline

STALE: dict[str, Any] = {"schedule": "stale", "warmup_steps": 1}
GENERATIONS: dict[str, Callable[[Any], Tensor]] = {
    "first": lambda pipe: run(pipe, steps=STEPS),
    "other seed": lambda pipe: run(pipe, steps=STEPS, seed=8),
    "other prompt": lambda pipe: run(pipe, steps=STEPS, prompt="the sea"),
    "other size": lambda pipe: run(pipe, steps=STEPS, height=9, width=14),
    "batch": lambda pipe: run(pipe, steps=STEPS, prompt=["a hill", "the sea"]),
    "two passes": lambda pipe: run(pipe, **GUIDED),
    "from a picture": edited,
    "first again": lambda pipe: run(pipe, steps=STEPS),
}


def prepared(group: Group, **arguments: Any) -> Any:
    # Fills what torch.empty returns with NaN.
    torch.use_deterministic_algorithms(True)
    pipe = make_tiny_pipeline()
    parallelize(pipe, group=group, **(STALE | arguments))
    return pipe


def one_after_another(group: Group, attention: dict[str, Any]) -> list[Tensor]:
    pipe = prepared(group, **attention)
    return [generate(pipe) for generate in GENERATIONS.values()]


def each_afresh(group: Group, attention: dict[str, Any]) -> list[Tensor]:
    return [generate(prepared(group, **attention)) for generate in GENERATIONS.values()]


@pytest.mark.parametrize("attention", ATTENTION, ids=["average", "exact", "full"])
def test_no_generation_sees_anything_of_the_one_before(attention: dict[str, Any]) -> None:
    ours, fresh = run_ranks(one_after_another, 3, attention), run_ranks(each_afresh, 3, attention)
    for name, latents, expected in zip(GENERATIONS, ours[0], fresh[0], strict=True):
        assert torch.equal(latents, expected), name
    assert torch.equal(ours[0][0], ours[0][-1])


def stop_by_interrupt(pipe: Any) -> None:
    """Stops after two steps, decided on one rank."""

    def at_step_1(pipe: Any, step: int, _: Any, __: Any) -> dict[str, Any]:
        interrupt(pipe, when=require_striped(pipe).group.rank == 1 and step == 1)
        return {}

    run(pipe, steps=STEPS, seed=3, callback_on_step_end=at_step_1)


def stop_between_layers(pipe: Any) -> None:
    """Stops amid the third step: some layers have sent what is for the fourth."""
    calls = 0

    def stop(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Stop

    hook = pipe.transformer.single_transformer_blocks[0].register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        run(pipe, steps=STEPS, seed=3)
    hook.remove()


def stop_in_a_callback(pipe: Any) -> None:
    def stop(*_: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        run(pipe, steps=STEPS, seed=3, callback_on_step_end=stop)


STOPS = {"interrupt": stop_by_interrupt, "between layers": stop_between_layers, "callback": stop_in_a_callback}


def stopped_then_another(group: Group, attention: dict[str, Any]) -> list[Tensor]:
    pipe = prepared(group, **attention)
    results = []
    for stop in STOPS.values():
        stop(pipe)
        results.append(run(pipe, steps=STEPS))
    return results


@pytest.mark.parametrize("attention", ATTENTION, ids=["average", "exact", "full"])
def test_an_interrupted_generation_leaves_nothing_behind(attention: dict[str, Any]) -> None:
    expected = run_ranks(first_afresh, 3, attention)[0]
    for results in run_ranks(stopped_then_another, 3, attention):
        for how, latents in zip(STOPS, results, strict=True):
            assert torch.equal(latents, expected), how


def first_afresh(group: Group, attention: dict[str, Any]) -> Tensor:
    return run(prepared(group, **attention), steps=STEPS)


def stopped_in_a_layer(group: Group, call_that_stops: int) -> Tensor:
    """Its halos arrive, and its own were not sent yet; or, in the warm-up, were sent and not waited for."""
    pipe = make_tiny_pipeline()
    parallelize(pipe, group=group, window=4, **STALE)
    stop_in_attention(pipe, call_that_stops)
    with pytest.raises(Stop):
        run(pipe, steps=STEPS, seed=3)
    return run(pipe, steps=STEPS)


@pytest.mark.parametrize("call_that_stops", [1, 2, 3, 7, 8])
def test_nor_does_one_that_broke_off_in_a_layer(call_that_stops: int) -> None:
    expected = run_ranks(first_afresh, 2, ATTENTION[0])[0]
    for latents in run_ranks(stopped_in_a_layer, 2, call_that_stops):
        assert torch.equal(latents, expected)


def undone_and_put_on_again(group: Group) -> tuple[Tensor, Tensor]:
    pipe = make_tiny_pipeline()
    parallelized = parallelize(pipe, group=group, window=4, **STALE)
    run(pipe, steps=STEPS, seed=3)
    parallelized.undo()
    parallelize(pipe, group=group, window=4, **STALE)
    return run(pipe, steps=STEPS), run(make_tiny_pipeline(), steps=STEPS)


def test_undo_leaves_nothing_on_its_way() -> None:
    expected = run_ranks(first_afresh, 2, ATTENTION[0])[0]
    for latents, _ in run_ranks(undone_and_put_on_again, 2):
        assert torch.equal(latents, expected)


def passes_that_come_and_go(group: Group) -> list[Tensor]:
    """A transformer called by hand: a second pass in some steps only."""
    pipe = prepared(group, **ATTENTION[1])
    pipe.scheduler.set_timesteps(5, mu=1.0)
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(13), torch.arange(11), indexing="ij")
    inputs = {
        "encoder_hidden_states": torch.randn(1, 9, 24, generator=generator),
        "pooled_projections": torch.randn(1, 16, generator=generator),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3).float(),
        "txt_ids": torch.zeros(9, 3),
    }
    outputs = []
    for passes in (1, 2, 2, 1, 2):
        latents = torch.randn(1, 143, 64, generator=generator)
        outputs += [pipe.transformer(hidden_states=latents, **inputs).sample for _ in range(passes)]
    return outputs


def test_a_pass_without_a_step_before_is_synchronous() -> None:
    (first, *_), (alone, *_) = run_ranks(passes_that_come_and_go, 3), run_ranks(passes_that_come_and_go, 1)
    in_sync = [relative_error(ours, one) < 1e-4 for ours, one in zip(first, alone, strict=True)]
    assert in_sync == [True, False, True, False, False, False, False, True]


def cascade(group: Group, warmup_steps: int | None) -> tuple[list[Any], dict[str, list[Any]]]:
    """Three stages of 2, 3 and 3 steps, and what was counted in each step."""
    pipe = make_tiny_pipeline(sample_size=64)
    pipe.set_progress_bar_config(disable=True)
    how = {} if warmup_steps is None else {"schedule": "stale", "warmup_steps": warmup_steps}
    parallelized = parallelize(pipe, group=group, window=3, text_attention="exact", **how)
    pictures = clear_dist.generate(
        pipe,
        "a hill",
        height=192,
        width=160,
        num_inference_steps=2,
        upscaling=Upscaling(steps=3, strength=0.5, ntk_factor=10.0),
        max_sequence_length=8,
        seed=5,
    )
    return [picture.tobytes() for picture in pictures], parallelized.counters.as_dict()


def test_each_stage_of_a_cascade_has_a_warm_up_of_its_own() -> None:
    (in_sync, _), *_ = run_ranks(cascade, 3, None)
    (all_warm, _), *_ = run_ranks(cascade, 3, 3)
    assert all_warm == in_sync
    ((late, counted), *_), ((again, _), *_) = run_ranks(cascade, 3, 1), run_ranks(cascade, 3, 1)
    assert late == again != in_sync
    warm, lagging = (2 * 8 * 2 * 4 * numbers for numbers in (18, 17))
    assert counted["text_bytes_reduced"] == [warm, lagging, warm, lagging, lagging, warm, lagging, lagging]
