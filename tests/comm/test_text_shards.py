"""Text tokens that tell whose they are, and the reduction against softmax in float64; expectations use no plan."""

import os
import signal
from itertools import product

import pytest
import torch
from torch import Tensor

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.text_reduce import Exact
from clear_dist.comm.text_shards import TextGather, TextScatter
from clear_dist.geometry import TextPlan, plan_text
from tests.comm.test_text_reduce import BATCH, DIM, HEADS, REDUCTIONS, TEXT, attend, expected, inputs, keys_of
from tests.ranks import RanksFailedError, run_ranks

IMAGE = 4
MARKS = 3

Case = tuple[int, int, torch.dtype]
"""text tokens, batch, dtype"""


def shares(tokens: int, size: int) -> list[range]:
    """Each rank's text tokens: shares differ by one at most, the larger ones first."""
    lengths = [tokens // size + (rank < tokens % size) for rank in range(size)]
    return [range(sum(lengths[:rank]), sum(lengths[: rank + 1])) for rank in range(size)]


def order_of(rank: int, tokens: int, size: int) -> list[int]:
    """The text tokens as `rank` has them: the others' first, its own last."""
    mine = shares(tokens, size)[rank]
    return [token for token in range(tokens) if token not in mine] + list(mine)


def marked(numbers: list[int], batch: int, mark: int, dtype: torch.dtype) -> Tensor:
    """[B, L, N, MARKS]: the token's number and `mark`, by batch and head; all exact in bfloat16."""
    number = torch.tensor(numbers, dtype=torch.long).view(1, -1, 1).expand(batch, len(numbers), HEADS)
    where = torch.arange(batch * HEADS).view(batch, 1, HEADS).expand_as(number)
    return torch.stack([number, torch.full_like(number, mark), where], dim=-1).to(dtype)


def check_case(group: Group, case: Case) -> None:
    tokens, batch, dtype = case
    order = order_of(group.rank, tokens, group.size)
    mine = len(shares(tokens, group.size)[group.rank])
    gather = TextGather(group, plan_text(tokens, group.size, group.rank), Counters())
    for turn in range(2):
        right = [marked([*order, *range(100, 100 + IMAGE)], batch, 3 * turn + kind, dtype) for kind in range(3)]
        given = [x.clone() for x in right]
        for x in given:
            x[:, : tokens - mine] = torch.nan
        if group.size > 1:
            gather.start(*given)
        gather.wait()
        assert all(map(torch.equal, given, right)), (case, turn)


def check_cases(group: Group, cases: list[Case], transport: str) -> None:
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    group = Group.create("cpu", transport=transport)
    for case in cases:
        check_case(group, case)


@pytest.mark.parametrize("transport", ["gloo", "host"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_every_token_comes_from_its_owner(size: int, transport: str) -> None:
    """Also shares of different length, and empty ones."""
    run_ranks(check_cases, size, list(product((1, 2, 7, 16), (1, 2), (torch.float32, torch.bfloat16))), transport)


def scattered(
    group: Group, mode: str, dtype: torch.dtype, spread: float, transport: str
) -> tuple[list[Tensor], dict[str, list]]:
    torch.use_deterministic_algorithms(True)
    group = Group.create("cpu", transport=transport)
    counters = Counters()
    plan = plan_text(TEXT, group.size, group.rank)
    reduction = TextScatter(group, REDUCTIONS[mode], counters, plan=plan)
    mine = keys_of(group.rank, group.size, 41, with_text=mode == "average" or group.rank == 0)
    query, key, value = inputs(41, spread)
    query = query[:, order_of(group.rank, TEXT, group.size)]
    results = []
    for factor in (1, 2):
        counters.begin_step()
        out, lse = attend(query, key[:, mine], factor * value[:, mine])
        into = torch.full((BATCH, plan.counts[group.rank], *out.shape[2:]), torch.nan, dtype=dtype)
        results.append(reduction.start(out.to(dtype), lse.float()).wait(into))
    return results, counters.as_dict()


def joined(results: list[tuple[list[Tensor], dict[str, list]]], turn: int) -> Tensor:
    return torch.cat([theirs[turn] for theirs, _ in results], dim=1).double()


@pytest.mark.parametrize("transport", ["gloo", "host"])
@pytest.mark.parametrize("mode", ["average", "exact"])
@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_each_rank_has_the_softmax_of_its_own_tokens(size: int, mode: str, transport: str) -> None:
    right = expected(mode, size, 41, 1.0)
    results = run_ranks(scattered, size, mode, torch.float32, 1.0, transport)
    assert [theirs[0].shape[1] for theirs, _ in results] == list(map(len, shares(TEXT, size)))
    for turn in range(2):
        torch.testing.assert_close(joined(results, turn), (turn + 1) * right, atol=1e-6, rtol=1e-6)


def test_exact_survives_scores_that_overflow_an_exponential() -> None:
    results = run_ranks(scattered, 3, "exact", torch.float32, 300.0, "gloo")
    torch.testing.assert_close(joined(results, 0), expected("exact", 3, 41, 300.0), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["average", "exact"])
def test_half_precision_travels_as_it_is(mode: str, dtype: torch.dtype) -> None:
    """Log-sum-exps travel in float32 all the same: in half precision weights would be off by per cents."""
    results = run_ranks(scattered, 3, mode, dtype, 1.0, "gloo")
    assert results[0][0][0].dtype == dtype
    torch.testing.assert_close(joined(results, 0), expected(mode, 3, 41, 1.0), atol=0.01, rtol=0.01)
    numbers = DIM * 2 + 4 * (mode == "exact")
    for _, counted in results:
        assert counted["text_bytes_reduced"] == [BATCH * TEXT * HEADS * numbers] * 2


def gathered_bytes(group: Group, tokens: int) -> list[int]:
    counters = Counters()
    gather = TextGather(group, plan_text(tokens, group.size, group.rank), counters)
    given = [torch.zeros(BATCH, tokens + IMAGE, HEADS, DIM) for _ in range(3)]
    for _ in range(2):
        counters.begin_step()
        gather.start(*given)
        gather.wait()
    return counters.as_dict()["text_bytes_gathered"]


def test_its_volume_is_the_longest_share() -> None:
    for tokens, longest in ((7, 3), (6, 2), (1, 1)):
        assert run_ranks(gathered_bytes, 3, tokens) == [[3 * BATCH * longest * HEADS * DIM * 4] * 2] * 3


def misuse(group: Group) -> None:
    gather = TextGather(group, plan_text(3, group.size, group.rank), Counters())
    given = [torch.zeros(1, 3, 1, 2)] * 3
    with pytest.raises(AssertionError, match="no tokens were sent"):
        gather.wait()
    gather.start(*given)
    with pytest.raises(AssertionError, match="not waited for"):
        gather.start(*given)
    gather.wait()
    gather.start(*given)
    gather.drain()  # a forward that was broken off
    gather.start(*given)
    gather.wait()
    replicated = TextGather(group, TextPlan((3,), 0), Counters())
    with pytest.raises(AssertionError, match="shared"):
        replicated.start(*given)
    replicated.wait()


def test_starting_twice_and_waiting_for_nothing_are_refused() -> None:
    run_ranks(misuse, 2)


def lose_a_rank(group: Group, where: str, how: str) -> None:
    plan = plan_text(6, group.size, group.rank)
    gather, scatter = TextGather(group, plan, Counters()), TextScatter(group, Exact(), Counters(), plan=plan)
    x = torch.zeros(1, 6, 1, 4)
    if group.rank == 1:
        if how == "raises":
            raise ZeroDivisionError("the cause")
        os.kill(os.getpid(), signal.SIGKILL)
    if where == "gather":
        gather.start(x, x, x)
        gather.wait()
    else:
        scatter.start(x, torch.zeros(1, 6, 1)).wait(x[:, :3])


@pytest.mark.parametrize("how", ["raises", "is killed"])
@pytest.mark.parametrize("where", ["gather", "scatter"])
def test_the_others_learn_of_a_lost_rank_within_seconds(where: str, how: str) -> None:
    with pytest.raises(RanksFailedError) as failed:
        run_ranks(lose_a_rank, 3, where, how)
    assert ("the cause" if how == "raises" else "exit code -9") in failed.value.failures[1]
    for rank in (0, 2):
        assert "clear_dist.comm.group.PeerLost: " in failed.value.failures[rank].splitlines()[-1]
