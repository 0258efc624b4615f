"""Rows that change hands: every wanted row arrives as it was, whoever had it, and no message is sent without need."""

from unittest.mock import patch

import pytest
import torch

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.rows import move_rows
from clear_dist.geometry import Rows, cut_in_stripes, plan_moves
from tests.ranks import RanksFailedError, run_ranks

BATCH, CHANNELS, WIDTH = SHAPE = (2, 3, 4)
NOTHING = Rows(0, 0)
Stripes = tuple[Rows, ...]


def picture(height: int, dtype: torch.dtype) -> torch.Tensor:
    """Row by row 0, 1, 2, ..., plus what tells pictures, channels and columns apart; exact in bfloat16 and as bytes."""
    places = torch.arange(BATCH).view(-1, 1, 1, 1) + torch.arange(CHANNELS).view(-1, 1, 1) + torch.arange(WIDTH)
    return (9 * torch.arange(height).view(-1, 1) + places).to(dtype)


def nan_filled(*args: object, **kwargs: object) -> torch.Tensor:
    tensor = torch.zeros(*args, **kwargs)  # type: ignore[call-overload]
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(251)


def move(
    group: Group, have: Stripes, want: Stripes, transport: str, dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, list]]:
    group = Group.create("cpu", transport=transport)
    mine, counters = have[group.rank], Counters()
    counters.begin_step()
    whole = picture(max(rows.stop for rows in have), dtype)
    # Not contiguous, as a part of a larger picture.
    local = whole[:, :, mine.start : mine.stop] if len(mine) else None
    for _ in range(2):
        with patch("torch.empty", nan_filled):
            moved = move_rows(local, group, have, want, shape=SHAPE, dtype=dtype, counters=counters)
    return moved, counters.as_dict()


CASES = {
    "one rank, all of it": ((Rows(0, 7),), (Rows(0, 7),)),
    "one rank, some of it": ((Rows(0, 7),), (Rows(2, 5),)),
    "one rank, nothing": ((Rows(0, 7),), (NOTHING,)),
    "rank 0 has everything": ((Rows(0, 9), NOTHING), (Rows(0, 6), Rows(4, 9))),
    "the last rank has everything": ((NOTHING, NOTHING, Rows(0, 9)), (Rows(0, 4), Rows(3, 7), Rows(6, 9))),
    "a smaller group had it": ((Rows(0, 6), Rows(6, 9), NOTHING), (Rows(0, 4), Rows(2, 7), Rows(5, 9))),
    "nobody wants a part": ((Rows(0, 3), Rows(3, 9)), (Rows(7, 9), Rows(1, 2))),
    "all stays": (cut_in_stripes(11, 3), cut_in_stripes(11, 3)),
    "all ranks want all": (cut_in_stripes(11, 5), (Rows(0, 11),) * 5),
    "each rank wants what another has": (cut_in_stripes(10, 5), cut_in_stripes(10, 5)[::-1]),
    "some have nothing, others want nothing": (
        (NOTHING, Rows(5, 8), NOTHING, Rows(0, 5), Rows(8, 9)),
        (Rows(4, 9), NOTHING, Rows(0, 9), Rows(5, 6), Rows(9, 9)),
    ),
}


@pytest.mark.parametrize(
    ("transport", "dtype"), [("gloo", torch.float32), ("host", torch.bfloat16), ("gloo", torch.uint8)]
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_rank_gets_the_rows_that_it_wants(
    case: tuple[Stripes, Stripes], transport: str, dtype: torch.dtype
) -> None:
    have, want = case
    whole = picture(max(rows.stop for rows in have), dtype)
    for rank, (moved, counted) in enumerate(run_ranks(move, len(have), have, want, transport, dtype)):
        assert moved.dtype == dtype
        assert torch.equal(moved, whole[:, :, want[rank].start : want[rank].stop])
        sent = sum(len(send.rows) for send in plan_moves(have, want, rank).sends)
        assert counted["other_bytes"] == [2 * sent * BATCH * CHANNELS * WIDTH * dtype.itemsize]
        assert counted["seconds_waiting"][0] >= 0


def move_within_a_part(group: Group) -> torch.Tensor | None:
    """From one of the larger group to a part of it, and to all again."""
    whole, counters = picture(9, torch.float32), Counters()
    part = group.split(2)
    if group.rank < 2:
        have, want = cut_in_stripes(9, 2), (Rows(3, 9), Rows(0, 6))
        local = whole[:, :, have[part.rank].relative_to(0)]
        local = move_rows(local, part, have, want, shape=SHAPE, dtype=torch.float32, counters=counters)
        local = local[:, :, 3:] if group.rank == 0 else local[:, :, :6]
    else:
        local = None
    have = (Rows(6, 9), Rows(0, 6), NOTHING)
    moved = move_rows(local, group, have, cut_in_stripes(9, 3), shape=SHAPE, dtype=torch.float32, counters=counters)
    part.close()
    return moved


def test_rows_move_within_a_part_of_a_group_and_out_of_it() -> None:
    moved = run_ranks(move_within_a_part, 3)
    assert torch.equal(torch.cat(moved, dim=2), picture(9, torch.float32))


def lose_a_rank(group: Group) -> None:
    if group.rank == 1:
        raise ZeroDivisionError("the cause")
    stripe = torch.zeros(BATCH, CHANNELS, 2, WIDTH)
    have = cut_in_stripes(6, 3)
    move_rows(stripe, group, have, have[::-1], shape=SHAPE, dtype=torch.float32, counters=Counters())
    move_rows(stripe, group, have, (Rows(0, 6),) * 3, shape=SHAPE, dtype=torch.float32, counters=Counters())


def test_the_others_learn_of_a_lost_rank() -> None:
    with pytest.raises(RanksFailedError) as failed:
        run_ranks(lose_a_rank, 3)
    assert "the cause" in failed.value.failures[1]
    for rank in (0, 2):
        assert "PeerLost: another rank is gone" in failed.value.failures[rank].splitlines()[-1]
