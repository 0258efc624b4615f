"""Rows of tokens that each rank holds and receives: whole numbers only, no tensors, no processes.

A stripe has the grid's full width, so columns matter to the circle only.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import isqrt

LEAST_TEXT = 0.1
"""Smallest share of a rank's tokens at which sharing the text is worth a second collective in each layer."""


@dataclass(frozen=True, order=True)
class Rows:
    """Rows [start, stop) of the grid."""

    start: int
    stop: int

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def intersect(self, other: "Rows") -> "Rows":
        """Rows in both; where there are none, empty at this stripe's end of the gap."""
        start = min(max(self.start, other.start), self.stop)
        return Rows(start, max(start, min(self.stop, other.stop)))

    def relative_to(self, first: int) -> slice:
        """Slice of a tensor whose row 0 is the grid's row `first`."""
        return slice(self.start - first, self.stop - first)


@dataclass(frozen=True)
class Transfer:
    """Rows that travel between this rank and `peer` (a rank within the group)."""

    peer: int
    rows: Rows


@dataclass(frozen=True)
class MovePlan:
    """Rows that one rank keeps, receives and sends; transfers in the order of the peers' ranks."""

    kept: Rows
    receives: tuple[Transfer, ...]
    sends: tuple[Transfer, ...]


@dataclass(frozen=True)
class HaloPlan:
    """Rows that one rank sends and receives in each layer."""

    own: Rows
    extended: Rows
    """Own rows and every row that their windows reach."""
    receives: tuple[Transfer, ...]
    """In ascending order of rows; several owners on one side where stripes are thinner than the halo."""
    sends: tuple[Transfer, ...]

    @property
    def halos(self) -> tuple[Rows, Rows]:
        """Rows above `own` and rows below it; empty at the border of the grid."""
        return Rows(self.extended.start, self.own.start), Rows(self.own.stop, self.extended.stop)


@dataclass(frozen=True)
class TextPlan:
    """Text tokens that a rank takes through the blocks: a share, or all where text is replicated.

    In the attention every rank has all of them: the other ranks' in the order of ranks, then its own.
    """

    counts: tuple[int, ...]
    """Tokens of each share; one number where the text is replicated, or there is one rank."""
    rank: int

    @property
    def is_shared(self) -> bool:
        return len(self.counts) > 1

    @property
    def before(self) -> int:
        """Text tokens of lower ranks."""
        return sum(self.counts[: self.rank])

    @property
    def elsewhere(self) -> int:
        """Text tokens of all other ranks."""
        return sum(self.counts) - self.counts[self.rank]

    @property
    def own(self) -> slice:
        """This rank's tokens in the text's own order."""
        return slice(self.before, self.before + self.counts[self.rank])


def cut_in_stripes(rows: int, ranks: int, *, unit: int = 1) -> tuple[Rows, ...]:
    """One stripe of whole units per rank, the taller ones first.

    Args:
        rows: height of the grid in tokens.
        unit: rows that stay together: 1, or the factor of down-sampled keys.

    Raises:
        ValueError: `rows` is not a multiple of `unit`, or there are more ranks than units.
    """
    require_units("height", rows, unit)
    units = rows // unit
    if not 1 <= ranks <= units:
        nearest = max(1, min(ranks, units))
        raise ValueError(f"{rows} rows of tokens can be cut for 1 to {units} ranks, got {ranks}; nearest: {nearest}")
    share, rest = divmod(units, ranks)
    starts = [unit * (rank * share + min(rank, rest)) for rank in range(ranks + 1)]
    return tuple(Rows(start, stop) for start, stop in pairwise(starts))


def require_units(side: str, tokens: int, unit: int) -> None:
    """Raises ValueError unless a side of the grid is a multiple of `unit` tokens."""
    if tokens % unit:
        nearest = max(1, (tokens + unit // 2) // unit) * unit
        raise ValueError(f"the {side} in tokens must be a multiple of {unit}, got {tokens}; nearest: {nearest}")


def plan_halos(stripes: tuple[Rows, ...], rank: int, radius: int | None) -> HaloPlan:
    """Halos of `rank` for windows of `radius` tokens; None: every row of the grid (full attention).

    A key is seen if dx^2 + dy^2 < radius^2, strictly, so a halo is radius - 1 rows.
    """
    grid = Rows(0, stripes[-1].stop)
    extended = tuple(reach(stripe, grid, radius) for stripe in stripes)
    moves = plan_moves(stripes, extended, rank)
    return HaloPlan(own=stripes[rank], extended=extended[rank], receives=moves.receives, sends=moves.sends)


def plan_pooled(stripes: tuple[Rows, ...], rank: int, factor: int) -> HaloPlan:
    """Exchange of down-sampled rows, one for each `factor` rows of the grid: every rank needs all of them."""
    pooled = tuple(Rows(stripe.start // factor, stripe.stop // factor) for stripe in stripes)
    return plan_halos(pooled, rank, None)


def plan_moves(have: tuple[Rows, ...], want: tuple[Rows, ...], rank: int) -> MovePlan:
    """Sends and receives of `rank` that take every rank p from rows have[p] to rows want[p].

    Args:
        have: disjoint, in any order; may be empty.
        want: may overlap and be empty; some rank has each of their rows.
    """
    assert len(have) == len(want), f"{len(have)} ranks have rows, {len(want)} want some"
    others = [peer for peer in range(len(have)) if peer != rank]
    receives = [Transfer(peer, have[peer].intersect(want[rank])) for peer in others]
    sends = [Transfer(peer, have[rank].intersect(want[peer])) for peer in others]
    plan = MovePlan(
        kept=have[rank].intersect(want[rank]),
        receives=tuple(transfer for transfer in receives if len(transfer.rows)),
        sends=tuple(transfer for transfer in sends if len(transfer.rows)),
    )
    found = len(plan.kept) + sum(len(transfer.rows) for transfer in plan.receives)
    assert found == len(want[rank]), f"rank {rank} wants {want[rank]}, of which there are {found} rows"
    return plan


def plan_text(tokens: int, ranks: int, rank: int) -> TextPlan:
    """Shares that differ by at most one token, some of them empty where there are more ranks than tokens."""
    share, rest = divmod(tokens, ranks)
    return TextPlan(tuple(share + (other < rest) for other in range(ranks)), rank)


def sharing_text_pays(tokens: int, image_tokens: int, ranks: int) -> bool:
    """Whether a share of the text on each rank should take less time than all of it on all.

    True of 512 text tokens at 64 x 64 image tokens from 2 ranks on, at 128 x 128 from 4, at 256 x 256 from 15. The
    bound comes from counts of operations; it was tried on CPUs only.
    """
    return tokens >= LEAST_TEXT * (tokens + image_tokens / ranks)


def reach(rows: Rows, grid: Rows, radius: int | None) -> Rows:
    """Rows of `grid` that the windows of `rows` touch, and so those whose windows touch `rows`."""
    if not len(rows):
        return Rows(grid.start, grid.start)
    return grid if radius is None else grid.intersect(Rows(rows.start - radius + 1, rows.stop + radius - 1))


def half_widths(radius: int) -> tuple[int, ...]:
    """Largest distance in columns within the circle, for each distance in rows from 0 to radius - 1."""
    return tuple(isqrt(radius * radius - dy * dy - 1) for dy in range(radius))


def covering_radius(height: int, width: int) -> int:
    """Smallest radius whose circle holds the whole grid wherever its centre is."""
    return isqrt((height - 1) ** 2 + (width - 1) ** 2) + 1


def reached_tiles(radius: int, query_tile: tuple[int, int], key_tile: tuple[int, int]) -> dict[int, range]:
    """Tiles of keys that the circles of one tile of queries touch: columns of tiles, by row of tiles.

    Tiles are (rows, columns) in tokens. Tile (y, x) of the keys begins y * key_tile[0] rows below and
    x * key_tile[1] columns right of the first query, so this, like the mask, is the same for all tiles of queries.
    """
    widths = half_widths(radius)
    (query_rows, query_columns), (key_rows, key_columns) = query_tile, key_tile
    tiles = {}
    for y in range((1 - radius) // key_rows, (query_rows + radius - 2) // key_rows + 1):
        distance = max(0, y * key_rows - query_rows + 1, -(y + 1) * key_rows + 1)
        width = widths[distance]
        tiles[y] = range(-width // key_columns, (query_columns - 1 + width) // key_columns + 1)
    return tiles


def visited_tiles(
    first_key: tuple[int, int], keys: tuple[int, int], tiles: dict[int, range], key_tile: tuple[int, int]
) -> int:
    """Number of `tiles`, as `reached_tiles` returns them, that hold a key.

    Args:
        first_key: row and column of the keys at the tile's first query; the row may lie outside.
        keys: rows and columns of keys.
    """
    (row, column), (rows, columns), (tile_rows, tile_columns) = first_key, keys, key_tile
    present = range(-column // tile_columns, -((column - columns) // tile_columns))
    return sum(
        max(0, min(across.stop, present.stop) - max(across.start, present.start))
        for y, across in tiles.items()
        if rows and row + (y + 1) * tile_rows > 0 and row + y * tile_rows < rows
    )
