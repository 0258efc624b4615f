"""Stripes, halo plans and the circle, against their definitions; no process, no tensor."""

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from clear_dist.geometry import (
    HaloPlan,
    MovePlan,
    Rows,
    Transfer,
    cut_in_stripes,
    half_widths,
    plan_halos,
    plan_moves,
    plan_pooled,
    plan_text,
    reach,
    reached_tiles,
    sharing_text_pays,
    visited_tiles,
)

ROWS = st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda ends: Rows(*sorted(ends)))


def members(rows: Rows) -> set[int]:
    return set(range(rows.start, rows.stop))


@st.composite
def stripes(draw: st.DrawFn) -> tuple[Rows, ...]:
    unit = draw(st.integers(1, 4))
    units = draw(st.integers(1, 40))
    return cut_in_stripes(units * unit, draw(st.integers(1, min(units, 9))), unit=unit)


@st.composite
def plans(draw: st.DrawFn) -> tuple[tuple[Rows, ...], int | None, list[HaloPlan]]:
    """Stripes, a radius and the plans of all ranks."""
    cut = draw(stripes())
    radius = draw(st.none() | st.integers(1, 50))
    return cut, radius, [plan_halos(cut, rank, radius) for rank in range(len(cut))]


@st.composite
def moves(draw: st.DrawFn) -> tuple[tuple[Rows, ...], tuple[Rows, ...], list[MovePlan]]:
    """Rows that ranks have, in any order and some of them none, rows that they want, and the plans of all ranks."""
    height, ranks = draw(st.integers(1, 30)), draw(st.integers(1, 7))
    cuts = sorted(draw(st.lists(st.integers(0, height), min_size=ranks - 1, max_size=ranks - 1)))
    have = tuple(draw(st.permutations([Rows(*ends) for ends in pairwise([0, *cuts, height])])))
    ends = st.tuples(st.integers(0, height), st.integers(0, height))
    want = tuple(Rows(*sorted(draw(ends))) for _ in range(ranks))
    return have, want, [plan_moves(have, want, rank) for rank in range(ranks)]


@given(st.integers(0, 600), st.integers(1, 40))
def test_shares_of_the_text_are_all_of_it_in_order_and_differ_by_one(tokens: int, ranks: int) -> None:
    plans = [plan_text(tokens, ranks, rank) for rank in range(ranks)]
    assert [token for plan in plans for token in range(tokens)[plan.own]] == list(range(tokens))
    assert {plan.counts for plan in plans} == {tuple(len(range(tokens)[plan.own]) for plan in plans)}
    assert max(plans[0].counts) - min(plans[0].counts) <= 1
    for plan in plans:
        assert plan.is_shared == (ranks > 1)
        assert plan.before == plan.own.start
        assert plan.elsewhere == tokens - len(range(tokens)[plan.own])


@pytest.mark.parametrize(("pixels", "fewest"), [(1024, 2), (2048, 4), (4096, 15), (8192, 57)])
def test_sharing_flux_s_text_pays_from_so_many_ranks_on(pixels: int, fewest: int) -> None:
    """It pays where 512 tokens are a tenth of a rank's: at 2048 px they are 6 % on 2 ranks, 11 % on 4."""
    tokens = (pixels // 16) ** 2
    assert [ranks for ranks in range(2, 65) if sharing_text_pays(512, tokens, ranks)] == list(range(fewest, 65))


@given(ROWS, ROWS)
def test_intersection_holds_the_common_rows_and_lies_inside(mine: Rows, other: Rows) -> None:
    common = mine.intersect(other)
    assert members(common) == members(mine) & members(other)
    assert mine.start <= common.start <= common.stop <= mine.stop
    assert len(common) == len(members(common))


@given(ROWS, st.integers(0, 30))
def test_rows_relative_to_a_first_row_pick_the_same_rows(rows: Rows, first: int) -> None:
    assume(first <= rows.start)
    assert set(list(range(first, 70))[rows.relative_to(first)]) == members(rows)


@given(st.integers(1, 5), st.integers(1, 60), st.data())
def test_stripes_are_whole_units_in_order_and_differ_by_one_at_most(unit: int, units: int, data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, units))
    cut = cut_in_stripes(unit * units, ranks, unit=unit)
    assert len(cut) == ranks
    assert (cut[0].start, cut[-1].stop) == (0, unit * units)
    assert all(above.stop == below.start for above, below in pairwise(cut))
    heights = [len(stripe) for stripe in cut]
    assert all(height % unit == 0 and height > 0 for height in heights)
    assert heights == sorted(heights, reverse=True)
    assert heights[0] - heights[-1] <= unit


@given(st.integers(2, 5), st.integers(1, 60), st.data())
def test_every_rank_gets_every_pooled_row_once(factor: int, units: int, data: st.DataObject) -> None:
    """Pooled row y stands for the rows y * factor and on, all on one rank; that rank sends it to all others."""
    ranks = data.draw(st.integers(1, units))
    cut = cut_in_stripes(factor * units, ranks, unit=factor)
    owners = [next(rank for rank, rows in enumerate(cut) if factor * y in members(rows)) for y in range(units)]
    for rank in range(ranks):
        plan = plan_pooled(cut, rank, factor)
        assert members(plan.own) == {y for y in range(units) if owners[y] == rank}
        received = [(transfer.peer, y) for transfer in plan.receives for y in sorted(members(transfer.rows))]
        assert received == [(owner, y) for y, owner in enumerate(owners) if owner != rank]
        assert {(transfer.peer, transfer.rows) for transfer in plan.sends} == {
            (peer, plan.own) for peer in range(ranks) if peer != rank
        }


@pytest.mark.parametrize(
    ("rows", "ranks", "unit", "message"),
    [
        (13, 2, 4, "must be a multiple of 4, got 13; nearest: 12"),
        (3, 1, 8, "must be a multiple of 8, got 3; nearest: 8"),
        (5, 6, 1, "can be cut for 1 to 5 ranks, got 6; nearest: 5"),
        (8, 3, 4, "can be cut for 1 to 2 ranks, got 3; nearest: 2"),
        (8, 0, 1, "can be cut for 1 to 8 ranks, got 0; nearest: 1"),
    ],
)
def test_what_cannot_be_cut_is_refused(rows: int, ranks: int, unit: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut_in_stripes(rows, ranks, unit=unit)


@given(plans())
def test_extended_rows_are_what_the_windows_see(case: tuple[tuple[Rows, ...], int | None, list[HaloPlan]]) -> None:
    cut, radius, all_plans = case
    height = cut[-1].stop
    for plan in all_plans:
        seen = {key for key in range(height) for row in members(plan.own) if radius is None or abs(key - row) < radius}
        assert members(plan.extended) == seen
        assert plan.extended == reach(plan.own, Rows(0, height), radius)


@given(plans())
def test_what_is_received_is_the_halo_each_row_once_from_its_owner(
    case: tuple[tuple[Rows, ...], int | None, list[HaloPlan]],
) -> None:
    cut, _, all_plans = case
    for rank, plan in enumerate(all_plans):
        received = [row for transfer in plan.receives for row in range(transfer.rows.start, transfer.rows.stop)]
        assert received == sorted(members(plan.extended) - members(plan.own))
        for transfer in plan.receives:
            assert transfer.peer != rank
            assert len(transfer.rows) > 0
            assert members(transfer.rows) <= members(cut[transfer.peer])


@given(plans())
def test_what_one_rank_sends_another_receives(case: tuple[tuple[Rows, ...], int | None, list[HaloPlan]]) -> None:
    _, _, all_plans = case
    sent = {(rank, send.peer, send.rows) for rank, plan in enumerate(all_plans) for send in plan.sends}
    received = {(receive.peer, rank, receive.rows) for rank, plan in enumerate(all_plans) for receive in plan.receives}
    assert sent == received
    for plan in all_plans:
        rows = sorted(set().union(*(members(send.rows) for send in plan.sends)))
        assert [row for run in plan.borders for row in range(run.start, run.stop)] == rows
        assert [run.stop - 1 for run in plan.borders] == [row for row in rows if row + 1 not in rows]


@given(plans())
def test_halos_are_the_rows_around_a_stripe_that_it_sees(
    case: tuple[tuple[Rows, ...], int | None, list[HaloPlan]],
) -> None:
    for plan in case[2]:
        above, below = map(members, plan.halos)
        assert above | below == members(plan.extended) - members(plan.own)
        assert all(row < plan.own.start for row in above)
        assert all(row >= plan.own.stop for row in below)


@given(ROWS, ROWS, st.none() | st.integers(1, 40))
def test_rows_reach_what_their_windows_see_wherever_they_lie(rows: Rows, grid: Rows, radius: int | None) -> None:
    seen = {key for key in members(grid) for row in members(rows) if radius is None or abs(key - row) < radius}
    reached = reach(rows, grid, radius)
    assert members(reached) == seen
    assert grid.start <= reached.start <= reached.stop <= grid.stop


@given(moves())
def test_each_wanted_row_is_kept_or_arrives_once(
    case: tuple[tuple[Rows, ...], tuple[Rows, ...], list[MovePlan]],
) -> None:
    have, want, all_plans = case
    for rank, plan in enumerate(all_plans):
        assert members(plan.kept) == members(have[rank]) & members(want[rank])
        received = [row for transfer in plan.receives for row in sorted(members(transfer.rows))]
        assert sorted([*received, *members(plan.kept)]) == sorted(members(want[rank]))
        for transfer in (*plan.receives, *plan.sends):
            assert transfer.peer != rank
            assert len(transfer.rows) > 0
        assert len({transfer.peer for transfer in plan.receives}) == len(plan.receives)
        assert len({transfer.peer for transfer in plan.sends}) == len(plan.sends)


@given(moves())
def test_moved_rows_are_sent_by_the_rank_that_has_them_to_those_that_want_them(
    case: tuple[tuple[Rows, ...], tuple[Rows, ...], list[MovePlan]],
) -> None:
    have, _, all_plans = case
    sent = {(rank, send.peer, send.rows) for rank, plan in enumerate(all_plans) for send in plan.sends}
    received = {(receive.peer, rank, receive.rows) for rank, plan in enumerate(all_plans) for receive in plan.receives}
    assert sent == received
    assert all(members(rows) <= members(have[rank]) for rank, _, rows in sent)


@pytest.mark.parametrize("have", [(Rows(0, 3), Rows(4, 6)), (Rows(0, 4), Rows(2, 6))])
def test_rows_that_none_has_or_two_have_are_not_moved(have: tuple[Rows, ...]) -> None:
    with pytest.raises(AssertionError, match="rank 0 wants"):
        plan_moves(have, (Rows(0, 6), Rows(0, 0)), 0)


def test_one_rank_has_an_empty_plan() -> None:
    plan = plan_halos(cut_in_stripes(9, 1), 0, 4)
    assert (plan.receives, plan.sends) == ((), ())
    assert plan.own == plan.extended == Rows(0, 9)
    assert plan.halos == (Rows(0, 0), Rows(9, 9))


def test_thin_stripes_have_halos_of_several_owners() -> None:
    plan = plan_halos(cut_in_stripes(8, 8), 3, 4)
    assert plan.receives == tuple(Transfer(peer, Rows(peer, peer + 1)) for peer in (0, 1, 2, 4, 5, 6))
    assert plan.halos == (Rows(0, 3), Rows(4, 7))


@given(st.integers(1, 60))
def test_half_widths_are_the_circle(radius: int) -> None:
    widths = half_widths(radius)
    assert len(widths) == radius
    for row_distance, width in enumerate(widths):
        assert row_distance**2 + width**2 < radius**2 <= row_distance**2 + (width + 1) ** 2


TILE = st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 3, 8, 16]))


@given(st.integers(1, 40), TILE, TILE)
def test_reached_tiles_are_those_that_some_circle_touches(
    radius: int, query_tile: tuple[int, int], key_tile: tuple[int, int]
) -> None:
    found = {(y, x) for y, columns in reached_tiles(radius, query_tile, key_tile).items() for x in columns}

    def distance(tile: int, side: int, queries: int) -> int:
        return min(abs(key - query) for key in range(tile * side, (tile + 1) * side) for query in range(queries))

    sides = list(zip(key_tile, query_tile, strict=True))
    spans = [range(-(radius // side) - 2, (queries + radius) // side + 2) for side, queries in sides]
    down, across = ({tile: distance(tile, *side) for tile in span} for side, span in zip(sides, spans, strict=True))
    assert found == {(y, x) for y in down for x in across if down[y] ** 2 + across[x] ** 2 < radius**2}


@given(st.data())
def test_visited_tiles_are_the_reached_ones_that_hold_a_key(data: st.DataObject) -> None:
    key_tile = data.draw(TILE)
    tiles = reached_tiles(data.draw(st.integers(1, 20)), data.draw(TILE), key_tile)
    rows, columns = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 30))
    row, column = data.draw(st.integers(-40, 40)), data.draw(st.integers(0, columns - 1))
    visited = [
        (y, x)
        for y, across in tiles.items()
        for x in across
        if any(0 <= row + y * key_tile[0] + i < rows for i in range(key_tile[0]))
        and any(0 <= column + x * key_tile[1] + i < columns for i in range(key_tile[1]))
    ]
    assert visited_tiles((row, column), (rows, columns), tiles, key_tile) == len(visited)


@pytest.mark.parametrize(
    ("radius", "key_tile", "share"),
    [(8, (8, 16), 0.171), (16, (8, 16), 0.419), (32, (8, 16), 0.568), (8, (8, 8), 0.255), (16, (8, 8), 0.419), (32, (8, 8), 0.592)],
)  # fmt: skip
def test_share_of_visited_pairs_that_are_wanted(radius: int, key_tile: tuple[int, int], share: float) -> None:
    """512 x 512 tokens, tiles of 8 x 16 queries, as counted apart from this code."""
    tiles = reached_tiles(radius, (8, 16), key_tile)
    visited = sum(
        visited_tiles((row, column), (512, 512), tiles, key_tile)
        for row in range(0, 512, 8)
        for column in range(0, 512, 16)
    )
    wanted = sum(
        (512 - abs(dy)) * (512 - abs(dx))
        for dy in range(1 - radius, radius)
        for dx in range(1 - radius, radius)
        if dy * dy + dx * dx < radius * radius
    )
    assert wanted / (visited * 128 * key_tile[0] * key_tile[1]) == pytest.approx(share, abs=0.0006)
