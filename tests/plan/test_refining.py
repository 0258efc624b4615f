"""A plan of ways of refining: HiFlow's kept latents in stripes, I-Max's grid half a token off."""

from dataclasses import replace
from typing import Any

import pytest

from clear_dist.plan import Engine, PlanRequest
from clear_dist.plan.phases import Memory
from clear_dist.plan.timing import stage_time
from clear_dist.plan.traffic import step_traffic
from clear_dist.stages import Sampling, Upscaling
from tests.plan.asked import flux_request

F32, CHANNELS = 4, 16


def asked_for(refinement: str, size: int = 4096, *, scale: float = 1.0, **settings: Any) -> PlanRequest:
    upper = Upscaling(steps=6, later_steps=2, strength=1.0, refinement=refinement, true_cfg_scale=scale)
    first = Sampling(steps=8, true_cfg_scale=scale)
    usual: dict[str, Any] = {"height": size, "width": size, "world_size": 2, "text_attention": "exact"}
    usual["text_tokens"] = "replicated"
    return flux_request(**usual | {"sampling": first, "upscaling": upper} | settings)


def items(asked: PlanRequest, number: int, engine: Engine) -> dict[str, dict[str, int]]:
    return {phase.name: dict(phase.items) for phase in Memory(asked=asked, engine=engine).of_stage(0, number)}


def test_clean_latents_lie_in_stripes_of_both_ranks(engine: Engine) -> None:
    """128, 256 and 512 latents a side: six steps of the first stage for the second, two of that for the third."""
    led, plain = asked_for("hiflow"), asked_for("sdedit")
    assert [stage.sampling.steps for stage in led.stages] == [8, 6, 2]
    of_first, of_second = (steps * CHANNELS * side**2 * F32 // 2 for steps, side in ((6, 128), (2, 256)))
    for number, kept in enumerate((of_first, of_first + of_second, of_second)):
        mine, without = items(led, number, engine), items(plain, number, engine)
        assert mine["denoise"]["clean latents"] == kept == mine["decode"]["clean latents"]
        assert "clean latents" not in without["denoise"]
        assert mine["save"].get("clean latents", 0) == (of_first, of_second, 0)[number]
    mine, without = items(led, 2, engine)["denoise"], items(plain, 2, engine)["denoise"]
    assert mine["stage before"] - without["stage before"] == of_second
    # Two velocities, and the stage below's clean latents once for all and once for a rank's own.
    velocities, joined = 2 * CHANNELS * 512**2 * F32, CHANNELS * 256**2 * F32
    assert mine["latents"] - without["latents"] == velocities + joined + joined // 2


def test_a_step_joins_the_clean_latents_of_the_stage_below(engine: Engine) -> None:
    led, plain = asked_for("hiflow", 2048), asked_for("sdedit", 2048)
    mine, without = (step_traffic(engine, each, each.stages[1], each.parts[1][0]) for each in (led, plain))
    assert mine == replace(without, clean=CHANNELS * 128**2 * F32 // 2)
    assert mine.at_the_end - without.at_the_end == mine.sent - without.sent == mine.clean
    assert step_traffic(engine, led, led.stages[0], led.parts[0][0]).clean == 0


@pytest.mark.parametrize(
    ("settings", "grids", "copies"),
    [
        ({}, 2, (4, 2)),
        ({"schedule": "stale", "warmup_steps": 1}, 1, (1, 1)),
        ({"down_factor": 4}, 1, (2, 2)),
        ({"window": "full"}, 2, (4, 4)),
    ],
)
def test_even_steps_of_imax_have_a_row_and_a_column_more(
    settings: dict[str, Any], grids: int, copies: tuple[int, int], engine: Engine
) -> None:
    """129 x 129 tokens on 2 ranks; not where keys are down-sampled, and not where halos lag.

    A text for each block of 64 x 64 that a rank's rows touch, of whose rows the first rank has one more than 64.
    """
    led = asked_for("imax", 2048, **settings)
    rows = (65, 64) if grids == 2 else (64, 64)
    for part, mine, texts in zip(led.parts[1], rows, copies, strict=True):
        step = engine.step(led, led.stages[1], part)
        assert step.grids == grids and step.copies == max(copies)
        assert step.tokens == texts * led.text_tokens + mine * (129 if grids == 2 else 128)
    assert engine.step(led, led.stages[0], led.parts[0][0]).grids == 1
    assert engine.step(led, led.stages[0], led.parts[0][0]).copies == 1


def test_copies_of_the_text_go_to_the_other_rank_of_their_blocks(engine: Engine) -> None:
    """Two copies, of the band that both ranks have rows of; with down-sampled keys each has a band of its own."""
    led, pooled = asked_for("imax", 2048), asked_for("imax", 2048, down_factor=4)
    sent = [step_traffic(engine, led, led.stages[1], part) for part in led.parts[1]]
    layers, width = 57, 24 * (128 + 2) * 2
    assert [each.text_reduced for each in sent] == [2 * led.text_tokens * layers * width] * 2
    assert all(each.text_apart for each in sent)
    rows = sent[0].in_layers - sent[0].text_reduced  # all of it crosses the link, once
    assert rows == max(sent[0].halos_sent, sent[0].halos_received)
    assert step_traffic(engine, pooled, pooled.stages[1], pooled.parts[1][0]).text_reduced == 0


def test_halves_take_both_passes_on_each_grid(engine: Engine) -> None:
    led = asked_for("imax", 2048, scale=3.0, guidance_ranks=2, negative_prompt="fog")
    first, second = (stage_time(engine, led, number) for number in (0, 1))
    assert first is not None and second is not None
    assert (first.all_passes, second.all_passes) == (1, 2)
    assert second.total - second.encode - second.decode - second.capturing == pytest.approx((6 + 2) * second.step)
    assert second.capturing == 0  # no graphs on two grids
