"""Stripes of unequal height arrive on rank 0 in order, and nowhere else."""

import pytest
import torch

from clear_dist.comm.group import Group
from clear_dist.comm.rows import collect_stripes
from tests.ranks import run_ranks

WIDTH = 5


def collect(group: Group, heights: tuple[int, ...], transport: str) -> list[list]:
    group = Group.create("cpu", transport=transport)
    first = sum(heights[: group.rank])
    rows = torch.arange(first, first + heights[group.rank], dtype=torch.uint8)
    # Not contiguous, as pixels are once their channels have been moved.
    local = rows.expand(3, WIDTH, -1).permute(2, 1, 0)
    return [stripe.tolist() for stripe in collect_stripes(local, group, heights)]


@pytest.mark.parametrize("transport", ["gloo", "host"])
@pytest.mark.parametrize("heights", [(4,), (3, 2), (1, 5, 2), (0,), (0, 3), (2, 0), (0, 2, 0, 1, 0), (0, 0)])
def test_rank_0_gets_all_rows_in_order(heights: tuple[int, ...], transport: str) -> None:
    on_rank_0, *on_others = run_ranks(collect, len(heights), heights, transport)
    assert [len(stripe) for stripe in on_rank_0] == [rows for rows in heights if rows]
    assert [row for stripe in on_rank_0 for row in stripe] == [[[row] * 3] * WIDTH for row in range(sum(heights))]
    assert on_others == [[]] * (len(heights) - 1)
