"""What one layer's attention holds besides queries, keys and values: outputs, parts to be merged, a kernel's own."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, prod

from clear_dist.plan.choice import backend_of
from clear_dist.plan.step import FLOAT32, Step

TILE = (8, 16)
"""FlexAttention's, rows and columns; it pads to whole ones."""
MASK_ALIGNMENT = 8
"""Numbers that rows of a mask are padded to."""
MASKS_KEPT = 3
TILINGS = {"cpu": (8, 8 * 2**20), "cuda": (16, 256 * 2**20)}
"""Of `tiled`: side of a tile, bytes of gathered keys and values in one call."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of windowed attention, in tokens."""

    queries: int
    """Rows."""
    keys: int
    """Rows."""
    columns: int
    text: int
    radius: int


def attention_bytes(step: Step) -> int:
    """Of one layer, where it holds most."""
    if step.part.radius is None:
        return _full(step)
    own, *halos = _calls(step, step.part.radius)
    kernel = KERNELS[backend_of(step.request, step.part)]
    done, most = step.bytes_of(step.text), 0  # the text queries' output waits for its reduction
    for call in (own, *halos):
        most = max(most, done + kernel(step, call))
        done += _result(step, call.queries)
    if step.part.pooled_tokens:
        most = max(most, done + 2 * step.bytes_of(step.part.pooled_tokens) + _result(step, step.part.rows))
        done += _result(step, step.part.rows)
    output = step.bytes_of(step.tokens)
    merged = _merge(step, [call.queries for call in halos])
    return max(most, done + output + max(merged, _text(step)))


def masks_of(step: Step) -> tuple[int, ...]:
    """Bytes of each mask that stays once there is one, in the order in which they are used; only `masked` has any."""
    if step.part.radius is None or backend_of(step.request, step.part) != "masked":
        return ()
    return tuple(_mask_pairs(call) * step.request.itemsize for call in _calls(step, step.part.radius))


def _calls(step: Step, radius: int) -> list[Call]:
    """One's own keys with those of the text, then each halo's."""
    part = step.part
    own = Call(queries=part.rows, keys=part.rows, columns=part.columns, text=step.text, radius=radius)
    halos = (
        Call(queries=min(part.rows, rows), keys=rows, columns=part.columns, text=0, radius=radius)
        for rows in (part.above, part.below)
        if rows
    )
    return [own, *halos]


def _mask_pairs(call: Call) -> int:
    """Of queries and keys, those by which rows of a mask are padded included."""
    keys = call.text + call.keys * call.columns
    return call.queries * call.columns * (keys + -keys % MASK_ALIGNMENT)


def _result(step: Step, rows: int) -> int:
    """Output of so many rows, and its log-sum-exp."""
    tokens = rows * step.part.columns
    return step.bytes_of(tokens) + step.batch * tokens * step.request.model.heads * FLOAT32


def _merge(step: Step, reaching: list[int]) -> int:
    """Of a piece of rows that have several parts: the sum, a part in float32 and weighed, and the part before it.

    Args:
        reaching: how many rows see keys of each halo.
    """
    rows, pooled = step.part.rows, bool(step.part.pooled_tokens)
    in_both = max(0, sum(reaching) - rows) if len(reaching) > 1 else 0
    pieces = [(1 + pooled, rows - sum(reaching) + in_both), (3 + pooled, in_both)]
    pieces += [(2 + pooled, each - in_both) for each in reaching]
    copies = 3 if step.request.itemsize < FLOAT32 else 2
    rows_in_float32 = max(((copies + (parts > 2)) * length for parts, length in pieces if parts > 1), default=0)
    return step.batch * rows_in_float32 * step.part.columns * step.request.model.channels * FLOAT32


def _text(step: Step) -> int:
    """The text queries' reduction: what is sent, and what is made of it."""
    numbers = step.batch * step.text * step.request.model.channels
    if step.part.text_shares > 1:  # all parts of my tokens, in float32 and weighed
        return numbers * (1 if step.request.text_attention == "average" else 2) * FLOAT32
    if step.request.text_attention == "average":
        return 2 * numbers * step.request.itemsize
    return numbers * 4 * FLOAT32


def _full(step: Step) -> int:
    """Keys and values of the whole grid in one piece, and the output."""
    together = 2 * step.bytes_of(step.text + step.part.all_tokens)
    return together + step.bytes_of(step.tokens)


def _flex(step: Step, call: Call) -> int:
    """Queries, keys, values and output once more, in the order of tiles; then the output in raster order."""
    tile = prod(TILE)
    across = ceil(call.columns / TILE[1])
    queries = ceil(call.queries / TILE[0]) * across * tile
    keys = (ceil(call.keys / TILE[0]) * across + ceil(call.text / tile)) * tile
    return step.bytes_of(2 * queries + 2 * keys)


def _masked(step: Step, call: Call) -> int:
    """Text and image keys and values in one piece; then the result, before it a byte a pair while the mask is made."""
    keys = step.bytes_of(call.text + call.keys * call.columns)
    queries = step.bytes_of(call.queries * call.columns) * (step.batch > 1)
    return 2 * keys + max(queries + _result(step, call.queries), _mask_pairs(call))


def _triton(step: Step, call: Call) -> int:
    """It reads where things lie."""
    return _result(step, call.queries)


def _tiled(step: Step, call: Call) -> int:
    """Keys and values gathered for a call's tiles, their queries, their output and that of the call before."""
    side, bytes_per_call = TILINGS["cuda" if step.request.on_cuda else "cpu"]
    most = 0
    for (queries_down, keys_down, _), rows in _spans(call.queries, call.keys, side, call.radius).items():
        for (queries_across, keys_across, _), columns in _spans(call.columns, call.columns, side, call.radius).items():
            gathered = 2 * step.bytes_of(call.text + keys_down * keys_across)
            count = max(1, bytes_per_call // gathered)
            across = min(columns, count)
            tiles = across * min(rows, max(1, count // across))
            most = max(most, tiles * (gathered + 3 * step.bytes_of(queries_down * queries_across)))
    mask = side**2 * (side + 2 * call.radius - 2) ** 2 * step.request.itemsize
    return _result(step, call.queries) + most + mask


def _spans(queries: int, keys: int, side: int, radius: int) -> Counter[tuple[int, int, int]]:
    """Along one dimension, how many tiles have so many queries and keys, and so many keys before the first query."""
    spans: Counter[tuple[int, int, int]] = Counter()
    for start in range(0, queries, side):
        length, first = min(side, queries - start), max(0, start - radius + 1)
        spans[length, max(1, min(keys, start + length + radius - 1) - first), start - first] += 1
    return spans


def _reference(step: Step, call: Call) -> int:
    """Every score in float32, before and after the softmax."""
    pairs = call.queries * call.columns * (call.text + call.keys * call.columns)
    return _result(step, call.queries) + 2 * FLOAT32 * step.batch * step.request.model.heads * pairs


KERNELS: dict[str, Callable[[Step, Call], int]] = {
    "flex": _flex,
    "flash": _flex,
    "triton": _triton,
    "tiled": _tiled,
    "masked": _masked,
    "reference": _reference,
}
"""By backend: bytes of a call, its result included."""
