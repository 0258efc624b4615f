"""Ranks of a stage: the choice against plans of the same stage on so many ranks and no more."""

from dataclasses import replace
from typing import Any

import pytest

from clear_dist.plan import GPUS, LINKS, Engine, Plan, Room
from clear_dist.plan.choice import Fewer, by_size, chosen, fewer_ranks
from clear_dist.plan.timing import stage_time
from tests.plan.asked import flux_request

MOST = 8
SMALL = {"height": 512, "width": 512, "cascade": False, "world_size": MOST}
SLOW = LINKS["10gbe"]


def planned(engine: Engine, *, room: int = GPUS["h100"].memory, **settings: Any) -> Plan:
    asked = flux_request(**SMALL | {"link": SLOW} | settings)
    return Plan(asked=asked, room=Room(bytes=room, where="a GPU"), engine=engine)


def seconds(engine: Engine, ranks: int, **settings: Any) -> float:
    """The plan of a request for so many ranks, none of which is idle."""
    asked = flux_request(**SMALL | {"link": SLOW} | settings | {"world_size": ranks})
    time = stage_time(engine, asked, 0)
    assert time is not None
    return time.total


@pytest.mark.parametrize("link", ["nvlink", "pcie4", "pcie3", "10gbe"])
@pytest.mark.parametrize("side", [256, 512, 1024])
def test_the_choice_is_the_best_of_halves_where_it_is_clear(side: int, link: str, engine: Engine) -> None:
    settings = {"height": side, "width": side, "gpu": GPUS["l40s"], "link": LINKS[link]}
    times = {ranks: seconds(engine, ranks, **settings) for ranks in (8, 4, 2, 1)}
    best = min(times, key=times.__getitem__)
    found = fewer_ranks(planned(engine, **settings))
    if times[best] > 0.95 * times[MOST] or times[best] > times[MOST] - 0.5:
        assert found == ()
    else:
        assert [(each.ranks, each.most, each.size) for each in found] == [(best, MOST, (side, side))]
        assert (found[0].seconds, found[0].on_most) == pytest.approx((times[best], times[MOST]))


def test_of_a_cascade_only_the_stage_that_gains(engine: Engine) -> None:
    """Over PCIe 3 the messages of 1024 px outlast its computing on 8 ranks, those of 4096 px do not."""
    plan = planned(engine, height=4096, width=4096, cascade=True, gpu=GPUS["h100"], link=LINKS["pcie3"])
    ranks = [len(parts) for parts in chosen(plan).asked.parts]
    assert ranks[0] < MOST == ranks[-1]
    assert ranks == sorted(ranks)
    assert chosen(plan).seconds < plan.seconds


@pytest.mark.parametrize(
    "settings",
    [
        {"world_size": 1},
        {"stage_ranks": "all"},
        {"shard_weights": True},
        {"schedule": "stale"},
        {"profile": "trace.json"},
        {"shares_gpus": True},
        {"gpu": None},
        {"gpu": replace(GPUS["h100"], flops=0.0)},
    ],
    ids=str,
)
def test_where_all_ranks_draw_in_any_case(settings: Any, engine: Engine) -> None:
    assert fewer_ranks(planned(engine)) != ()
    assert fewer_ranks(planned(engine, **settings)) == ()


def test_no_more_memory_than_there_is(engine: Engine) -> None:
    """A rank alone takes more than one of several; with room for neither all ranks stay."""
    plan = planned(engine, height=2048, width=2048)
    assert [each.ranks for each in fewer_ranks(plan)] == [1]
    alone = chosen(plan).memory.of_rank(0).drawing.total
    two = replace(plan, asked=replace(plan.asked, stage_ranks={(2048, 2048): 2})).memory.of_rank(0).drawing.total
    assert two < alone
    found = fewer_ranks(replace(plan, room=Room(bytes=round(1.1 * alone) - 1, where="a GPU")))
    assert [each.ranks for each in found] != [1]
    assert fewer_ranks(replace(plan, room=Room(bytes=two // 2, where="a GPU"))) == ()


def test_the_plan_counts_what_is_chosen(engine: Engine) -> None:
    """A stage on r of 8 ranks is that of r ranks; the others hold their weights and are idle."""
    plan = chosen(planned(engine))
    (ranks,) = plan.asked.stage_ranks.values()
    alike = planned(engine, world_size=ranks)
    first, there = (each.memory.of_rank(0).drawing.items for each in (plan, alike))
    assert {name: first[name] for name in there if name != "CUDA"} == {n: there[n] for n in there if n != "CUDA"}
    assert [phase.name for phase in plan.memory.of_rank(MOST - 1).phases if phase.stage == 0] == ["idle"]
    assert plan.asked.changed(num_images=2).stage_ranks == {}


def test_words() -> None:
    fewer = Fewer(size=(512, 768), ranks=4, most=8, seconds=1.5, on_most=2.0)
    assert fewer.words(averages=False) == "768x512 is drawn by 4 of 8 ranks, in 1.5 s by the plan where all take 2"
    assert "they draw another picture" in fewer.words(averages=True)
    assert by_size((fewer,)) == {(512, 768): 4}
