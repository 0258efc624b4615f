"""A plan with guidance ranks and data ranks: of a half as of half as many ranks without guidance, and joined by all."""

from dataclasses import replace
from typing import Any

import pytest

from clear_dist.plan import GPUS, LINKS, Engine, Plan, PlanRequest, Room
from clear_dist.plan.choice import chosen, halves_of
from clear_dist.plan.timing import stage_time
from clear_dist.plan.traffic import step_traffic
from clear_dist.stages import Sampling
from tests.plan.asked import flux_request

SIZE: dict[str, Any] = {"height": 2048, "width": 2048, "cascade": False, "text_attention": "exact"}
GUIDED = SIZE | {"negative_prompt": "fog", "sampling": Sampling(true_cfg_scale=3.0)}


def halved(**settings: Any) -> PlanRequest:
    return flux_request(**GUIDED | {"world_size": 8, "guidance_ranks": 2} | settings)


def test_a_half_sends_what_as_many_ranks_do_for_one_pass(engine: Engine) -> None:
    asked, four = halved(), flux_request(**SIZE, world_size=4)
    for cut, part in zip(asked.parts[0], four.parts[0] * 2, strict=True):
        mine, theirs = (step_traffic(engine, each, each.stages[0], one) for each, one in ((asked, cut), (four, part)))
        assert replace(mine, halves=1) == theirs
        assert (mine.everyone, theirs.everyone) == (8, 4)
        assert mine.at_the_end == 7 * mine.join
    part = asked.parts[0][0]
    assert (part.ranks, part.stripes, part.rows, part.picture_rows) == (8, 4, 32, 16)


def test_a_half_computes_for_one_pass_and_the_first_step_for_both(engine: Engine) -> None:
    mine, theirs = (stage_time(engine, asked, 0) for asked in (halved(), flux_request(**SIZE, world_size=4)))
    assert mine is not None and theirs is not None
    assert mine.computing == theirs.computing and mine.host == theirs.host
    steps = Sampling().steps
    assert mine.total - mine.decode - mine.capturing == pytest.approx((steps + 1) * mine.step)
    assert theirs.total - theirs.decode - theirs.capturing == pytest.approx(steps * theirs.step)


def test_without_guidance_or_an_even_number_there_are_no_halves() -> None:
    assert not halved(negative_prompt=None).has_halves(halved().stages[0])
    unguided = halved(sampling=Sampling())
    assert not unguided.has_halves(unguided.stages[0]) and unguided.parts[0][0].stripes == 8
    assert halved().is_possible and not halved(world_size=7).is_possible
    assert not halved(world_size=8, data_ranks=3).is_possible


def test_data_groups_are_planned_as_one_of_them(engine: Engine) -> None:
    two, one = halved(world_size=16, data_ranks=2, num_images=3), halved(num_images=2)
    assert two.ranks == one.ranks == 8 and two.images(two.stages[0]) == one.images(one.stages[0]) == 2
    assert two.parts == one.parts
    traffic = [step_traffic(engine, each, each.stages[0], each.parts[0][0]) for each in (two, one)]
    assert traffic[0] == traffic[1]


@pytest.mark.parametrize(("link", "is_sooner"), [("10gbe", True), ("nvlink", False)])
def test_auto_takes_halves_where_they_are_clearly_sooner(link: str, is_sooner: bool, engine: Engine) -> None:
    asked = flux_request(**GUIDED, world_size=8, guidance_ranks="auto", link=LINKS[link], gpu=GPUS["h100"])
    plan = Plan(asked=asked, room=Room(bytes=GPUS["h100"].memory, where="a GPU"), engine=engine)
    halves = halves_of(plan)
    of_halves = replace(plan, asked=asked.changed(guidance_ranks=2))
    assert plan.seconds is not None and of_halves.seconds is not None
    assert (of_halves.seconds < 0.95 * plan.seconds) == is_sooner == (halves is not None)
    assert (chosen(plan).asked.request.guidance_ranks == 2) == is_sooner
    if halves is not None:
        assert (halves.seconds, halves.otherwise) == (of_halves.seconds, plan.seconds)
        assert "each half of 8 ranks takes a pass of guidance" in halves.words(averages=False)
    for without in ({"negative_prompt": None}, {"world_size": 7}, {"guidance_ranks": 1}, {"device": "cpu"}):
        assert halves_of(replace(plan, asked=asked.changed(**without))) is None
