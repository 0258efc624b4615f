"""Check of both text reductions against a computation on one rank.

Shapes: B batch, T text, N heads, D head dim.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.text_reduce import REDUCTIONS
from clear_dist.verify.dense import attention, largest_error
from clear_dist.verify.finding import Finding, Subjects

BATCH, TEXT, HEADS, HEAD_DIM = 2, 7, 3, 16
IMAGE_TOKENS_PER_RANK = 11
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""bfloat16 has 8 bits: each part is rounded by up to 2^-9 of its size, and so is the result."""


def check_reductions(group: Group, subjects: Subjects) -> Iterator[Finding]:
    """Every rank holds some of the image's keys, as many as the others or one fewer."""
    query, keys, values = _inputs(group.size)
    for reduction in REDUCTIONS:
        expected_of = {"average": _mean_over_ranks, "exact": _softmax}[reduction.word]
        expected = expected_of(group.size, query, keys, values)
        for dtype, tolerance in TOLERANCE.items():
            mine = _keys_of(group.rank, group.size, with_text=reduction.counts_text_keys(group.rank))
            out, lse = attention(query, keys[:, mine], values[:, mine])
            part = out.to(group.device, dtype), lse.to(group.device, torch.float32)
            reduced = subjects.reduction(group, reduction, Counters()).start(*part).wait(torch.empty_like(part[0]))
            error = largest_error(reduced, expected)
            yield Finding(
                name=f"text reduction, {reduction.word}, {str(dtype).removeprefix('torch.')}",
                error=error,
                tolerance=tolerance,
                figure=f"{TEXT} queries, {keys.shape[1]} keys on {group.size} ranks",
                fault=f"off by {error:.2g} of the largest number that one rank computes",
            )


def _inputs(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, T, N, D], keys and values [B, T + image, N, D] with the text first; equal on all ranks."""
    image = size * IMAGE_TOKENS_PER_RANK - (size > 1)
    generator = torch.Generator().manual_seed(size)
    query, key, value = (
        torch.randn(BATCH, length, HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)
        for length in (TEXT, TEXT + image, TEXT + image)
    )
    return 2 * query, key, value


def _keys_of(rank: int, size: int, *, with_text: bool) -> list[int]:
    image = size * IMAGE_TOKENS_PER_RANK - (size > 1)
    return [*range(TEXT if with_text else 0), *range(TEXT + rank, TEXT + image, size)]


def _softmax(_: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return attention(query, keys, values)[0]


def _mean_over_ranks(size: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Eq. 7: mean of attention to the text and to one rank's keys."""
    parts = [_keys_of(rank, size, with_text=True) for rank in range(size)]
    return torch.stack([attention(query, keys[:, part], values[:, part])[0] for part in parts]).mean(0)
