"""Unequal stripes are joined without a trace of their padding."""

from itertools import product

import pytest
import torch

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.rows import StripeJoin
from clear_dist.geometry import cut_in_stripes
from tests.ranks import run_ranks

CASES = list(product((8, 13, 19), (1, 5), (1, 2), (torch.float32, torch.bfloat16)))


def join(group: Group, transport: str) -> None:
    torch.use_deterministic_algorithms(True)  # torch.empty returns NaN
    group = Group.create("cpu", transport=transport)
    for rows, columns, batch, dtype in CASES:
        stripes, counters = cut_in_stripes(rows, group.size), Counters()
        stripe_join, own = StripeJoin(group, stripes, counters), stripes[group.rank]
        whole = torch.randn(2, batch, rows * columns, 3, generator=torch.Generator().manual_seed(rows)).to(dtype)
        joined = [stripe_join.join(turn[:, own.start * columns : own.stop * columns]) for turn in whole]
        # Both, after both: the first result is not overwritten by the second.
        assert all(torch.equal(got, expected) for got, expected in zip(joined, whole, strict=True))
        counters.begin_step()
        tallest = -(-rows // group.size)
        assert counters.as_dict()["join_bytes"] == [2 * batch * tallest * columns * 3 * dtype.itemsize]


@pytest.mark.parametrize("transport", ["gloo", "host"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_all_ranks_have_the_whole_grid(size: int, transport: str) -> None:
    run_ranks(join, size, transport)


def join_units(group: Group) -> torch.Tensor:
    stripes = cut_in_stripes(10, group.size, unit=2)
    own = stripes[group.rank]
    rows = torch.arange(own.start, own.stop, dtype=torch.float32)
    return StripeJoin(group, stripes, Counters()).join(rows.view(1, -1, 1))


def test_stripes_may_differ_by_a_unit_of_several_rows() -> None:
    for joined in run_ranks(join_units, 3):
        assert joined.flatten().tolist() == list(range(10))
