"""Rows of tokens that each rank holds and receives, at the grid's full width: no tensors, no processes.

An image that is cut by columns is transposed: from then on there are rows only.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import isqrt
from typing import Literal

LEAST_TEXT = 0.1
"""Share of a rank's tokens from which sharing the text is worth a second collective in each layer."""


@dataclass(frozen=True, order=True)
class Rows:
    """Rows [start, stop) of the grid."""

    start: int
    stop: int

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    @property
    def numbers(self) -> range:
        return range(self.start, self.stop)

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
    """Rows that one rank sends and receives in each layer, in ascending order; a side may have several owners."""

    own: Rows
    extended: Rows
    """Own rows and every row that their windows reach."""
    receives: tuple[Transfer, ...]
    sends: tuple[Transfer, ...]

    @property
    def halos(self) -> tuple[Rows, Rows]:
        """Rows above and below `own`; empty at the border of the grid."""
        return Rows(self.extended.start, self.own.start), Rows(self.own.stop, self.extended.stop)

    @property
    def borders(self) -> tuple[Rows, ...]:
        """Rows that any rank is sent, ascending; those of several ranks that touch or overlap are one run."""
        runs: list[Rows] = []
        for rows in sorted(move.rows for move in self.sends):
            touches = bool(runs) and rows.start <= runs[-1].stop
            first = runs.pop() if touches else rows
            runs.append(Rows(first.start, max(first.stop, rows.stop)))
        return tuple(runs)


@dataclass(frozen=True)
class Striping:
    """All stripes of an image; where they are runs of columns, those of rows of the transposed image."""

    by_columns: bool
    stripes: tuple[Rows, ...]
    width: int
    """Tokens in a row."""

    @property
    def lines(self) -> Literal["rows", "columns"]:
        """What the stripes are runs of in the image."""
        return "columns" if self.by_columns else "rows"

    def sent(self, radius: int | None) -> tuple[int, int]:
        """Tokens whose keys all ranks send together, and those of the longest stripe, as long as all in a join."""
        grid = Rows(0, self.stripes[-1].stop)
        halos = sum(len(reach(stripe, grid, radius)) - len(stripe) for stripe in self.stripes)
        return self.width * halos, self.width * max(map(len, self.stripes))


@dataclass(frozen=True)
class TextPlan:
    """Text tokens of a rank in the blocks: a share, or all; attention has other ranks' in order, then its own."""

    counts: tuple[int, ...]
    """Tokens of each share; one number where the text is replicated, or there is one rank."""
    rank: int

    @property
    def is_shared(self) -> bool:
        return len(self.counts) > 1

    @property
    def before(self) -> int:
        """Text tokens on lower ranks."""
        return sum(self.counts[: self.rank])

    @property
    def elsewhere(self) -> int:
        """Text tokens on other ranks."""
        return sum(self.counts) - self.counts[self.rank]

    @property
    def own(self) -> slice:
        return slice(self.before, self.before + self.counts[self.rank])


@dataclass(frozen=True)
class CopiedText(TextPlan):
    """Copies of the text (I-Max) that a rank holds, one for each block of tokens that its rows touch."""

    held: tuple[Rows, ...]
    """Bands of blocks, by rank."""
    place: int
    """This rank's in `held`."""

    @property
    def shared(self) -> tuple[Rows, ...]:
        """Bands whose copies this rank holds, too, by rank."""
        mine = self.held[self.place]
        return tuple(bands.intersect(mine) for bands in self.held)


def stripe_image(size: tuple[int, int], ranks: int, *, cut: str, radius: int | None, unit: int = 1) -> Striping:
    """An image of `size` tokens in stripes of its `cut`: rows, columns, or auto, where ranks send fewer bytes.

    Those are the halos' and then the join's; rows where both are equal, and on one rank, which has all of the image.
    Raises ValueError where a side is not a multiple of `unit`, or there are more ranks than units.
    """
    for side, tokens in zip(("height", "width"), size, strict=True):
        require_units(side, tokens, unit)
    wanted = {"rows": [False], "columns": [True], "auto": [False, True]}[cut if ranks > 1 else "rows"]
    possible = [by_columns for by_columns in wanted if ranks * unit <= size[by_columns]]
    if not possible:  # to be refused, with the most that could be
        possible = [max(wanted, key=lambda by_columns: size[by_columns])]
    found = (_striping(size, ranks, by_columns, unit) for by_columns in possible)
    return min(found, key=lambda striping: striping.sent(radius))


def _striping(size: tuple[int, int], ranks: int, by_columns: bool, unit: int) -> Striping:
    along, across = size[by_columns], size[not by_columns]
    stripes = cut_in_stripes(along, ranks, unit=unit, lines="columns" if by_columns else "rows")
    return Striping(by_columns, stripes, across)


def most_stripes(size: tuple[int, int], *, cut: str, unit: int = 1) -> int:
    """Most ranks that can draw a picture of `size` tokens: its VAE works on whole rows of them, whatever is `cut`."""
    rows, columns = (tokens // unit for tokens in size)
    return min(size[0], {"rows": rows, "columns": columns, "auto": max(rows, columns)}[cut])


def cut_in_stripes(rows: int, ranks: int, *, unit: int = 1, lines: str = "rows") -> tuple[Rows, ...]:
    """One stripe per rank in whole units of `unit` rows (1, or the factor of down-sampled keys), the taller ones first.

    Raises ValueError where `rows` is not a multiple of `unit`, or there are more ranks than units.
    """
    require_units("height", rows, unit)
    units = rows // unit
    if not 1 <= ranks <= units:
        nearest = max(1, min(ranks, units))
        raise ValueError(f"{rows} {lines} of tokens can be cut for 1 to {units} ranks, got {ranks}; nearest: {nearest}")
    share, rest = divmod(units, ranks)
    starts = [unit * (rank * share + min(rank, rest)) for rank in range(ranks + 1)]
    return tuple(Rows(start, stop) for start, stop in pairwise(starts))


def require_units(side: str, tokens: int, unit: int) -> None:
    """Raises ValueError unless a side of the grid is a multiple of `unit` tokens."""
    if tokens % unit:
        nearest = max(1, (tokens + unit // 2) // unit) * unit
        raise ValueError(f"the {side} in tokens must be a multiple of {unit}, got {tokens}; nearest: {nearest}")


def plan_halos(stripes: tuple[Rows, ...], rank: int, radius: int | None) -> HaloPlan:
    """Halos of radius - 1 rows, as a key is seen if dx^2 + dy^2 < radius^2 in tokens; None: every row of the grid."""
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

    `have` is disjoint, in any order; `want` may overlap, and some rank has each of its rows; both may be empty.
    """
    assert len(have) == len(want), f"{len(have)} ranks have rows, {len(want)} want some"
    others = [peer for peer in range(len(have)) if peer != rank]
    receives = tuple(Transfer(peer, rows) for peer in others if len(rows := have[peer].intersect(want[rank])))
    sends = tuple(Transfer(peer, rows) for peer in others if len(rows := have[rank].intersect(want[peer])))
    kept = have[rank].intersect(want[rank])
    found = len(kept) + sum(len(transfer.rows) for transfer in receives)
    assert found == len(want[rank]), f"rank {rank} wants {want[rank]}, of which there are {found} rows"
    return MovePlan(kept, receives, sends)


def plan_text(tokens: int, ranks: int, rank: int) -> TextPlan:
    """Shares that differ by at most one token, some of them empty where there are more ranks than tokens."""
    share, rest = divmod(tokens, ranks)
    return TextPlan(tuple(share + (other < rest) for other in range(ranks)), rank)


def bands_of(tokens: int, side: int | None) -> tuple[Rows, ...]:
    """Bands of `side` rows or columns, of which the last one has what is left over; one where there are fewer, or None.

    As many as in I-Max's code: floor(tokens / side), at least one.
    """
    side = side or tokens
    starts = [side * number for number in range(max(1, tokens // side))]
    return tuple(Rows(start, stop) for start, stop in pairwise([*starts, tokens]))


def touched(bands: tuple[Rows, ...], rows: Rows) -> Rows:
    """Which bands have some of these rows."""
    numbers = [number for number, band in enumerate(bands) if len(band.intersect(rows))]
    return Rows(numbers[0], numbers[-1] + 1)


def sharing_text_pays(tokens: int, image_tokens: int, ranks: int) -> bool:
    """Whether a share of the text on each rank should take less time than all of it, by counts of operations.

    512 tokens: from 2 ranks at 64 x 64 image tokens, 4 at 128 x 128, 15 at 256 x 256; it was tried on CPUs only.
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


def reached_tiles(
    radius: int, query_tile: tuple[int, int], key_tile: tuple[int, int], *, square: bool = False
) -> dict[int, range]:
    """Columns of tiles of keys that windows of a tile of queries touch, by row; tiles are (rows, columns) in tokens.

    Tile (y, x) begins y * key_tile[0] rows below and x * key_tile[1] columns right of the first query.
    """
    widths = half_widths(radius)
    (query_rows, query_columns), (key_rows, key_columns) = query_tile, key_tile
    tiles = {}
    for y in range((1 - radius) // key_rows, (query_rows + radius - 2) // key_rows + 1):
        distance = max(0, y * key_rows - query_rows + 1, -(y + 1) * key_rows + 1)
        width = radius - 1 if square else widths[distance]
        tiles[y] = range(-width // key_columns, (query_columns - 1 + width) // key_columns + 1)
    return tiles


def visited_tiles(
    first_key: tuple[int, int], keys: tuple[int, int], tiles: dict[int, range], key_tile: tuple[int, int]
) -> int:
    """Number of `tiles` (from `reached_tiles`) that hold a key; the first query is at `first_key`, maybe outside."""
    (row, column), (rows, columns), (tile_rows, tile_columns) = first_key, keys, key_tile
    present = range(-column // tile_columns, -((column - columns) // tile_columns))
    return sum(
        max(0, min(across.stop, present.stop) - max(across.start, present.start))
        for y, across in tiles.items()
        if rows and row + (y + 1) * tile_rows > 0 and row + y * tile_rows < rows
    )
