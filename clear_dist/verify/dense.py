"""Attention by its definition, in float64 and in one piece, for comparison.

Shapes: B batch, L queries, S keys, N heads, D head dim.
"""

import torch
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention [B, L, N, D] and log-sum-exp [B, L, N] in float64; `seen`: bool [L, S], None: all keys."""
    scores = torch.einsum("blnd,bsnd->blns", query.double(), key.double()) / query.shape[-1] ** 0.5
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
    return torch.einsum("blns,bsnd->blnd", scores.softmax(-1), value.double()), scores.logsumexp(-1)


def circle(queries: tuple[int, int], key_rows: int, radius: int, row_offset: int) -> Tensor:
    """Image keys that queries (rows, columns) see, bool [L, S]: row i of queries is row i + row_offset of keys."""
    rows, columns = queries
    query = torch.cartesian_prod(torch.arange(rows) + row_offset, torch.arange(columns))
    key = torch.cartesian_prod(torch.arange(key_rows), torch.arange(columns))
    return (query[:, None] - key).square().sum(-1) < radius**2


def largest_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest expected number; NaN where one is found."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return ((found - expected).abs().max() / expected.abs().max()).item()
