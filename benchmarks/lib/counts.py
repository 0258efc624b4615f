"""Exact counts for FLUX over stripes by formula: operations of a step, and bytes that a rank hands over.

Benchmarks compare them with times, tests with what the engine tells. Operations are those that are wanted: what a
kernel does besides, in blocks that are partly masked, is its own loss. An operation is a multiplication or an addition.
Embeddings and modulation, less than 1 %, are left out, as in the paper.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from clear_dist.geometry import (
    HaloPlan,
    Rows,
    Transfer,
    covering_radius,
    cut_in_stripes,
    half_widths,
    plan_halos,
    plan_pooled,
    sharing_text_pays,
)
from clear_dist.options import Schedule, TextAttention, TextTokens, Window
from clear_dist.plan.traffic import Traffic

Grid = tuple[int, int]
"""Height and width in tokens."""
TOKEN = 16
"""Pixels along the side of a token."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What counts of a FLUX transformer depend on."""

    double_blocks: int
    single_blocks: int
    heads: int
    head_dim: int
    text_tokens: int
    itemsize: int
    """Bytes of a number."""
    output_channels: int = 64

    @property
    def layers(self) -> int:
        return self.double_blocks + self.single_blocks

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class Part:
    """An image's stripe on one of several ranks; on one rank, the image."""

    grid: Grid
    ranks: int
    rank: int
    window: Window
    factor: int = 1
    """Down-sampling factor of the extra keys; 1: there are none."""

    @property
    def stripes(self) -> tuple[Rows, ...]:
        return cut_in_stripes(self.grid[0], self.ranks, unit=self.factor)

    @property
    def plan(self) -> HaloPlan:
        return plan_halos(self.stripes, self.rank, self.radius)

    @property
    def radius(self) -> int | None:
        """None: full attention."""
        return None if self.window == "full" else min(self.window, covering_radius(*self.grid))

    @property
    def pooled_plan(self) -> HaloPlan | None:
        """The exchange of down-sampled rows."""
        return plan_pooled(self.stripes, self.rank, self.factor) if self.has_pooled_keys else None

    @property
    def has_pooled_keys(self) -> bool:
        return self.factor > 1 and self.window != "full"

    @property
    def tokens(self) -> int:
        return len(self.plan.own) * self.grid[1]


def shares_of_text(tokens: int, image_tokens: int, ranks: int, schedule: Schedule, asked: TextTokens) -> int:
    """Number of shares of the text, as the engine chooses; 1: every rank takes all of it.

    Args:
        image_tokens: of the whole image.
        schedule: of the generation: a stale one that is all warm-up is in sync.
    """
    pays = asked == "auto" and schedule == "sync" and sharing_text_pays(tokens, image_tokens, ranks)
    return ranks if pays or asked == "sharded" else 1


def own_text(model: Model, part: Part, schedule: Schedule, asked: TextTokens = "auto") -> int:
    """Text tokens of the largest share, where ranks share them; else all of them."""
    shares = shares_of_text(model.text_tokens, part.grid[0] * part.grid[1], part.ranks, schedule, asked)
    return ceil(model.text_tokens / shares)


def linear_work(model: Model, part: Part, schedule: Schedule = "sync", asked: TextTokens = "auto") -> int:
    """Operations of the matrix products with weights: 12 x channels^2 weights a block, of both kinds."""
    tokens = part.tokens + own_text(model, part, schedule, asked)
    return 2 * 12 * model.channels**2 * model.layers * tokens


def attention_work(model: Model, part: Part, schedule: Schedule = "sync", asked: TextTokens = "auto") -> int:
    """Operations of attention in all layers: 4 x channels for each pair of a query and a key that it sees."""
    own = own_text(model, part, schedule, asked)
    pairs = attended_pairs(model.text_tokens, part, own_text=own) + pooled_pairs(part)
    return 4 * model.channels * model.layers * pairs


def attended_pairs(text: int, part: Part, *, own_text: int) -> int:
    """Pairs of a query and a key in one layer: image queries see all text, text queries all of the stripe.

    Args:
        own_text: the text queries that attend here where all keys are gathered.
    """
    if part.radius is None:
        return (own_text + part.tokens) * (text + part.grid[0] * part.grid[1])
    return text * (text + part.tokens) + part.tokens * text + circle_pairs(part.plan.own, part.grid, part.radius)


def pooled_pairs(part: Part) -> int:
    """Pairs of an image query and a down-sampled key in one layer: each sees those of the whole image."""
    height, width = part.grid
    return part.tokens * (height // part.factor) * (width // part.factor) if part.has_pooled_keys else 0


def circle_pairs(queries: Rows, grid: Grid, radius: int) -> int:
    """Pairs of an image query in the rows `queries` and an image key in the circle around it, cut off at the border."""
    height, width = grid
    pairs = 0
    for distance in range(-radius + 1, radius):
        half = min(half_widths(radius)[abs(distance)], width - 1)
        in_a_row = width + 2 * sum(width - step for step in range(1, half + 1))
        rows = min(queries.stop + distance, height) - max(queries.start + distance, 0)
        pairs += max(0, rows) * in_a_row
    return pairs


def traffic(
    model: Model,
    part: Part,
    schedule: Schedule,
    text_attention: TextAttention = "average",
    asked: TextTokens = "auto",
) -> Traffic:
    """One pass of a step after the warm-up; full attention reduces text by `exact`, and only where it lags."""
    plan, pooled, columns = part.plan, part.pooled_plan, part.grid[1]
    row = 2 * columns * model.channels * model.itemsize * model.layers
    text = model.text_tokens * model.channels * model.itemsize
    own = own_text(model, part, schedule, asked)
    is_shared = own < model.text_tokens
    if is_shared:  # parts as they are, behind them for `exact` the log-sum-exp in float32
        text += model.text_tokens * model.heads * 4 if text_attention == "exact" else 0
    elif part.radius is None or text_attention == "exact":
        maximum = 0 if schedule == "stale" else model.text_tokens * model.heads * 4
        text = maximum + model.text_tokens * model.heads * (model.head_dim + 1) * 4
    if part.radius is None and schedule == "sync":  # every rank computes it
        text = 0
    return Traffic(
        ranks=part.ranks,
        halos_sent=row * _rows(plan.sends),
        halos_received=row * _rows(plan.receives),
        pooled_sent=0 if pooled is None else row // part.factor * _rows(pooled.sends),
        pooled_received=0 if pooled is None else row // part.factor * _rows(pooled.receives),
        text_gathered=3 * own * model.channels * model.itemsize * model.layers if is_shared else 0,
        text_reduced=text * model.layers if part.ranks > 1 else 0,
        join=max(map(len, part.stripes)) * columns * model.output_channels * model.itemsize,
    )


def _rows(transfers: Iterable[Transfer]) -> int:
    return sum(len(transfer.rows) for transfer in transfers)


FLUX = Model(double_blocks=19, single_blocks=38, heads=24, head_dim=128, text_tokens=512, itemsize=2)
"""FLUX.1-dev in bfloat16."""


def middle_part(side: int, ranks: int, window: Window) -> Part:
    """The middle stripe of a square of `side` pixels: with 3 ranks or more it has a neighbour on both sides."""
    return Part(grid=(side // TOKEN, side // TOKEN), ranks=ranks, rank=ranks // 2, window=window)


def gathering_over_halos(model: Model, side: int, ranks: int, radius: int) -> float:
    """Bytes of a step through a rank's link if all keys and values are gathered, over those with halos."""
    window, full = (traffic(model, middle_part(side, ranks, kind), "sync") for kind in (radius, "full"))
    return (full.in_layers + full.at_the_end) / (window.in_layers + window.at_the_end)
