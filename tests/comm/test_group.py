"""Who is in a group, what it shares, and what happens when one of its ranks goes away."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.halo_exchange import HaloExchange
from clear_dist.comm.rows import StripeJoin
from clear_dist.comm.text_reduce import Exact, TextReduce
from clear_dist.geometry import cut_in_stripes, plan_halos
from tests.ranks import RanksFailedError, run_ranks


def exchange_and_join(group: Group) -> tuple[list[float], list[float]]:
    """The global ranks of the neighbours, as their halos tell, and of all, as the join tells. One row each."""
    stripes = cut_in_stripes(group.size, group.size)
    me = torch.full((1, 1, 2, 1, 1), float(group.ranks[group.rank]))
    halos = HaloExchange(group, plan_halos(stripes, group.rank, 2), Counters()).start(me, me).wait()
    text = TextReduce(group, Exact(), Counters()).start(me.view(1, 1, 2, 1), torch.zeros(1, 1, 2))
    text = text.wait(torch.empty(1, 1, 2, 1))
    assert text.eq(sum(group.ranks) / group.size).all()
    joined = StripeJoin(group, stripes, Counters()).join(me.view(1, 2, 1))
    return [halo[0].max().item() for halo in halos if halo.numel()], joined[0, ::2, 0].tolist()


def test_one_process_alone_runs_the_same_code() -> None:
    group = Group.create("cpu")
    try:
        assert (group.rank, group.size, group.ranks, group.transport) == (0, 1, (0,), "gloo")
        assert exchange_and_join(group) == ([], [0.0])
        assert group.broadcast_object("a") == "a"
        assert group.all_reduce(torch.tensor([3.0]), "max").tolist() == [3.0]
        assert group.agree(True) and not group.agree(False)
    finally:
        group.close()
    assert not dist.is_initialized()


def use_upper_half(group: Group) -> tuple | None:
    upper_half = dist.new_group([2, 3])
    if group.rank < 2:
        # These take no part: whatever the others sent here would be left to the barrier at the end.
        with pytest.raises(ValueError, match="rank of process_group"):
            Group.create("cpu", process_group=upper_half)
        return None
    mine = Group.create("cpu", process_group=upper_half)
    found = (
        mine.rank,
        mine.ranks,
        exchange_and_join(mine),
        mine.broadcast_object(group.rank),
        mine.gather_objects(group.rank),
    )
    mine.close()
    assert dist.is_initialized()
    return found


def test_a_group_of_global_ranks_2_and_3_does_not_talk_to_0_and_1() -> None:
    assert run_ranks(use_upper_half, 4) == [
        None,
        None,
        (0, (2, 3), ([3.0], [2.0, 3.0]), 2, [2, 3]),
        (1, (2, 3), ([2.0], [2.0, 3.0]), 2, [2, 3]),
    ]


def split_again_and_again(group: Group, counts: tuple[int, ...]) -> list[tuple]:
    """What a rank finds in its part of each split; the ranks of the second part leave theirs unused."""
    found = []
    groups_before = len(dist.distributed_c10d._world.pg_map)
    for count in counts:
        part = group.split(count)
        assert (part.transport, part.device, part.timeout) == (group.transport, group.device, group.timeout)
        assert part.ranks == (group.ranks[:count] if group.rank < count else group.ranks[count:])
        if group.rank < count:
            time.sleep(0.02 * group.rank)  # some are late
            found.append((part.rank, exchange_and_join(part)[1], part.gather_objects(group.rank)))
        part.close()
        assert len(dist.distributed_c10d._world.pg_map) == groups_before
        assert exchange_and_join(group)[1] == list(group.ranks)
    return found


def split_the_world(group: Group, counts: tuple[int, ...], transport: str) -> list[tuple]:
    return split_again_and_again(Group.create("cpu", transport=transport), counts)


@pytest.mark.parametrize("transport", ["gloo", "host"])
def test_a_group_is_split_again_and_again(transport: str) -> None:
    counts = (2, 2, 3, 1, 4, 2)
    for rank, found in enumerate(run_ranks(split_the_world, 4, counts, transport)):
        parts = [count for count in counts if rank < count]
        assert found == [(rank, [float(peer) for peer in range(count)], list(range(count))) for count in parts]


def split_a_part_of_the_world(group: Group, counts: tuple[int, ...]) -> list[tuple] | None:
    upper = dist.new_group([2, 3, 4])
    if group.rank < 2:
        return None
    for _ in range(3):
        Group.create("cpu", process_group=upper).close()
    return split_again_and_again(Group.create("cpu", process_group=upper), counts)


def test_a_group_of_global_ranks_2_to_4_is_split_while_0_and_1_do_something_else() -> None:
    counts = (2, 2, 1, 3, 2)
    *idle, third, fourth, fifth = run_ranks(split_a_part_of_the_world, 5, counts)
    assert idle == [None, None]
    for rank, found in enumerate([third, fourth, fifth]):
        parts = [count for count in counts if rank < count]
        assert found == [(rank, [2.0, 3.0, 4.0][:count], list(range(count))) for count in parts]


def use_parts_side_by_side(group: Group) -> list[int]:
    """Both parts in use, a part of a part, and another split while these exist: the ranks are in unequally many."""
    part = group.split(3)
    inner = part.split(2) if group.rank < 3 else part
    other = group.split(4)
    sizes = [one.size for _ in range(2) for one in (inner, other, group, part) if exchange_and_join(one)]
    for one in (other, *((inner,) if group.rank < 3 else ()), part):
        one.close()
    group.barrier()
    return sizes


def test_parts_and_parts_of_parts_live_side_by_side() -> None:
    first, second, third, fourth, fifth = run_ranks(use_parts_side_by_side, 5)
    assert first == second == [2, 4, 5, 3] * 2
    assert third == [1, 4, 5, 3] * 2
    assert fourth == [2, 4, 5, 2] * 2
    assert fifth == [2, 1, 5, 2] * 2


@pytest.mark.parametrize("count", [0, 2])
def test_only_ranks_that_exist_can_be_split_off(count: int) -> None:
    group = Group.create("cpu")
    try:
        with pytest.raises(AssertionError, match=f"the first {count} of 1 ranks"):
            group.split(count)
    finally:
        group.close()


def share(group: Group, transport: str) -> None:
    group = Group.create("cpu", transport=transport)
    source = 1
    tensors = [
        torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).transpose(0, 2),
        None,
        torch.tensor([True, False]),
        torch.tensor(7),
        torch.zeros(0, 3),
    ]
    received = group.broadcast_tensors(tensors if group.rank == source else None, source)
    for got, sent in zip(received, tensors, strict=True):
        assert (got is None and sent is None) or (got.dtype == sent.dtype and torch.equal(got, sent))
    assert group.broadcast_object({"seed": group.rank}, source) == {"seed": source}
    assert group.gather_objects(group.rank) == list(range(group.size))
    assert group.agree(group.rank == 2)
    assert not group.agree(False)
    mine = torch.tensor([group.rank, -group.rank])
    assert group.all_reduce(mine, "sum").tolist() == [3, -3]
    assert group.all_reduce(mine, "max").tolist() == [2, 0]
    assert mine.tolist() == [group.rank, -group.rank]
    group.barrier()


@pytest.mark.parametrize("transport", ["gloo", "host"])
def test_ranks_share_tensors_objects_and_decisions(transport: str) -> None:
    run_ranks(share, 3, transport)


def test_nccl_is_refused_on_cpu() -> None:
    with pytest.raises(ValueError, match="transport of cpu must be one of auto, gloo, host, got nccl"):
        Group.create("cpu", transport="nccl")


def lose_a_rank(group: Group, where: str, how: str) -> None:
    stripes = cut_in_stripes(3 * group.size, group.size)
    exchange = HaloExchange(group, plan_halos(stripes, group.rank, 3), Counters())
    reduction, join = TextReduce(group, Exact(), Counters()), StripeJoin(group, stripes, Counters())
    stripe = torch.zeros(1, 3, 2, 1, 4)
    exchange.start(stripe, stripe).wait()
    if group.rank == 1:
        if how == "raises":
            raise ZeroDivisionError("the cause")
        if how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    if where == "halos":
        for _ in range(3):
            exchange.start(stripe, stripe).wait()
    elif where == "text":
        reduction.start(stripe[0], torch.zeros(1, 3, 2, 1)[0]).wait(stripe[0])
    elif where == "join":
        join.join(stripe.view(1, 6, 4))
    else:
        group.agree(False)


@pytest.mark.parametrize("how", ["raises", "is killed"])
@pytest.mark.parametrize("where", ["halos", "text", "join", "decision"])
def test_the_others_learn_of_a_lost_rank_within_seconds(where: str, how: str) -> None:
    with pytest.raises(RanksFailedError) as failed:
        run_ranks(lose_a_rank, 3, where, how)
    failures = failed.value.failures
    assert ("the cause" if how == "raises" else "exit code -9") in failures[1]
    for rank in (0, 2):
        assert "clear_dist.comm.group.PeerLost: " in failures[rank].splitlines()[-1]
    if where == "halos":
        assert "PeerLost: rank 1 is gone" in failures[0] or "PeerLost: a neighbour is gone" in failures[0]
    assert str(failed.value).startswith("rank 1: ")


def wait_for_a_sleeper(group: Group) -> None:
    impatient = Group.create("cpu", timeout_seconds=1)
    if group.rank == 1:
        time.sleep(60)
    exchange_and_join(impatient)


def test_a_rank_that_does_not_answer_counts_as_lost_after_the_timeout() -> None:
    with pytest.raises(RanksFailedError) as failed:
        run_ranks(wait_for_a_sleeper, 2, timeout=6)
    assert "PeerLost" in failed.value.failures[0]
    assert "was killed" in failed.value.failures[1]
