"""Rows of a mesh: who draws together, and that all ranks still meet."""

from functools import partial

import pytest
import torch

from clear_dist.comm.group import Group
from clear_dist.comm.mesh import image_group
from tests.ranks import run_ranks


def sums(everyone: Group, data_ranks: int) -> tuple[float, float]:
    """Sums of ranks' numbers, over the row and over all."""
    row = image_group(everyone, data_ranks)
    mine = torch.tensor([float(everyone.rank)])
    return row.all_reduce(mine, "sum").item(), everyone.all_reduce(mine, "sum").item()


@pytest.mark.parametrize(("data_ranks", "rows"), [(4, [0, 1, 2, 3]), (2, [1, 1, 5, 5])])
def test_rows_and_all_ranks_can_send(data_ranks: int, rows: list[int]) -> None:
    assert run_ranks(partial(sums, data_ranks=data_ranks), 4) == [(row, 6) for row in rows]
