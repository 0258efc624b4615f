"""Every halo cell tells its owner, row, column, batch, head, and how often it was sent; expectations use no plan."""

from itertools import product

import pytest
import torch
from torch import Tensor

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.halo_exchange import HaloExchange
from clear_dist.geometry import Rows, cut_in_stripes, plan_halos
from tests.ranks import run_ranks

HEADS = 2
MARKS = 6
COLUMNS = 3

Case = tuple[int, int | None, int, torch.dtype]
"""rows of the grid, radius, batch, dtype"""


def owners_of_rows(rows: int, size: int) -> list[int]:
    """The rank of each row: stripes differ by one row at most, the taller ones first."""
    return [rank for rank in range(size) for _ in range(rows // size + (rank < rows % size))]


def rows_seen(rows: int, size: int, rank: int, radius: int | None) -> list[int]:
    """Rows of others within the windows of `rank`'s rows, by the definition of the circle (dx = 0)."""
    owners = owners_of_rows(rows, size)
    mine = [row for row in range(rows) if owners[row] == rank]
    near = [row for row in range(rows) if radius is None or any((row - own) ** 2 < radius**2 for own in mine)]
    return [row for row in near if row not in mine]


def marked(row_numbers: list[int], owners: list[int], batch: int, mark: int, dtype: torch.dtype) -> Tensor:
    """[B, rows, W, N, MARKS]: owner, row, column, batch, head and `mark`; all exact in bfloat16."""
    shape = (batch, len(row_numbers), COLUMNS, HEADS)
    indices = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij"), dim=-1)
    row = torch.tensor(row_numbers, dtype=torch.long).view(1, -1, 1, 1).expand(shape)
    owner = torch.tensor([owners[r] for r in row_numbers], dtype=torch.long).view(1, -1, 1, 1).expand(shape)
    return torch.stack([owner, row, *indices[..., [2, 0, 3]].unbind(-1), torch.full(shape, mark)], dim=-1).to(dtype)


def not_contiguous(tensor: Tensor) -> Tensor:
    """The same values, heads before rows in memory, as attention processors have them."""
    return tensor.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)


def check_case(group: Group, case: Case) -> None:
    rows, radius, batch, dtype = case
    owners = owners_of_rows(rows, group.size)
    mine = [row for row in range(rows) if owners[row] == group.rank]
    seen = rows_seen(rows, group.size, group.rank, radius)
    sides = [row for row in seen if row < mine[0]], [row for row in seen if row > mine[-1]]
    exchange = HaloExchange(group, plan_halos(cut_in_stripes(rows, group.size), group.rank, radius), Counters())
    for turn in range(3):
        key, value = (not_contiguous(marked(mine, owners, batch, 2 * turn + kind, dtype)) for kind in (0, 1))
        halos = exchange.start(key, value).wait()
        for halo, side in zip(halos, sides, strict=True):
            assert halo.dtype == dtype
            for kind in (0, 1):
                assert torch.equal(halo[kind], marked(side, owners, batch, 2 * turn + kind, dtype)), (case, turn, side)
            halo.fill_(float("nan"))


def check_cases(group: Group, cases: list[Case], transport: str) -> None:
    # Fills what torch.empty returns with NaN.
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    group = Group.create("cpu", transport=transport)
    for case in cases:
        check_case(group, case)


@pytest.mark.parametrize("transport", ["gloo", "host"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_every_halo_cell_comes_from_its_owner(size: int, transport: str) -> None:
    # Rows that divide and that do not; stripes thinner than the halo, which then has several owners; no halo (1).
    cases = list(product((size, size + 1, 13, 29), (1, 2, 4, 8, 16, None), (1, 2), (torch.float32, torch.bfloat16)))
    run_ranks(check_cases, size, cases if transport == "gloo" else cases[::5], transport)


def count(group: Group, rows: int, radius: int | None, layers: int) -> dict[str, list]:
    counters = Counters()
    exchange = HaloExchange(group, plan_halos(cut_in_stripes(rows, group.size), group.rank, radius), counters)
    owned = owners_of_rows(rows, group.size).count(group.rank)
    key = torch.zeros(2, owned, COLUMNS, HEADS, 4, dtype=torch.bfloat16)
    for _ in range(2):
        counters.begin_step()
        for _ in range(layers):
            exchange.start(key, key).wait()
    return counters.as_dict()


@pytest.mark.parametrize(
    ("size", "rows", "radius"), [(1, 9, 4), (2, 13, 4), (3, 13, 8), (5, 12, 8), (5, 11, None), (3, 9, 1)]
)
def test_one_message_per_neighbour_and_layer_of_exactly_the_rows_it_needs(
    size: int, rows: int, radius: int | None
) -> None:
    layers = 3
    owners = owners_of_rows(rows, size)
    bytes_per_row = 2 * 2 * COLUMNS * HEADS * 4 * 2  # K and V, batch, W, channels, bfloat16
    for rank, counted in enumerate(run_ranks(count, size, rows, radius, layers)):
        rows_for = [
            sum(owners[row] == rank for row in rows_seen(rows, size, peer, radius))
            for peer in range(size)
            if peer != rank
        ]
        assert counted["halo_messages_sent"] == [layers * sum(number > 0 for number in rows_for)] * 2
        assert counted["halo_bytes_sent"] == [layers * bytes_per_row * sum(rows_for)] * 2
        assert counted["text_bytes_reduced"] == counted["join_bytes"] == [0, 0]
        assert all(seconds >= 0 for seconds in counted["seconds_waiting"])


def send_large_halos_in_haste(group: Group) -> None:
    """Rank 0 has its small halo, and could go on, long before its own message, too large for a socket, is gone."""
    stripes = (Rows(0, 40), Rows(40, 41))
    exchange, addresses = HaloExchange(group, plan_halos(stripes, group.rank, 41), Counters()), set()
    mine, peer = len(stripes[group.rank]), 1 - group.rank
    for turn in range(6):
        stripe = torch.full((1, mine, 64, 24, 64), float(10 * turn + group.rank))
        halos = exchange.start(stripe, stripe + 0.5).wait()
        addresses.add(tuple(halo.data_ptr() for halo in halos))
        halo = halos[peer]
        assert halo.shape[2] == len(stripes[peer])
        assert (halo[0] == 10 * turn + peer).all()
        assert (halo[1] == 10 * turn + peer + 0.5).all()
    assert len(addresses) == 1, "buffers are not kept"


def test_buffers_are_kept_and_not_packed_before_they_are_sent() -> None:
    run_ranks(send_large_halos_in_haste, 2)


def misuse(group: Group) -> None:
    exchange = HaloExchange(group, plan_halos(cut_in_stripes(4, group.size), group.rank, 2), Counters())
    stripe = torch.zeros(1, 2, COLUMNS, HEADS, 4)
    pending = exchange.start(stripe, stripe)
    with pytest.raises(AssertionError, match="not waited for"):
        exchange.start(stripe, stripe)
    pending.wait()
    with pytest.raises(AssertionError, match="already"):
        pending.wait()
    with pytest.raises(AssertionError, match="rows"):
        exchange.start(stripe[:, :1], stripe[:, :1])


def test_starting_twice_waiting_twice_and_other_rows_are_refused() -> None:
    run_ranks(misuse, 2)


def change_modes(group: Group) -> None:
    exchange = HaloExchange(group, plan_halos(cut_in_stripes(4, group.size), group.rank, 2), Counters())
    stripe = torch.ones(1, 2, COLUMNS, HEADS, 4, requires_grad=True)
    with torch.inference_mode():
        exchange.start(stripe, stripe).wait()
    halos = exchange.start(2 * stripe, 2 * stripe).wait()
    assert halos[1 - group.rank].eq(2).all()
    assert not any(halo.requires_grad for halo in halos)


def test_buffers_made_under_inference_mode_serve_without_it() -> None:
    run_ranks(change_modes, 2)
