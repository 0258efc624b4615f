"""Attention over parts of the keys, merged by log-sum-exp into attention over all of them.

O = sum_p O_p e^(lse_p - m) / sum_p e^(lse_p - m), where m is the largest lse_p: exact, however the keys were cut.

Shape suffixes: B batch, L queries (or R rows and W columns of them), N heads, D head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, starmap

import torch
from torch import Tensor

from clear_dist.geometry import Rows


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint sets of keys: (out [B, L, N, D], lse [B, L, N] in float32) each.

    An lse of -inf means no key, whatever the output; dtype as of the first part. Raises ValueError where there is none.
    """
    if not parts:
        raise ValueError("merge needs at least one part, got none")
    lse_BLN = torch.stack([lse for _, lse in parts]).logsumexp(0)
    weighted = (_weigh(out, lse, lse_BLN)[0] for out, lse in parts)
    summed_BLND = next(weighted)
    for part_BLND in weighted:
        summed_BLND += part_BLND
    return summed_BLND.to(parts[0][0].dtype), lse_BLN


@dataclass(frozen=True)
class RowsPart:
    """Attention of some rows of queries to one set of keys: out [B, R, W, N, D], lse [B, R, W, N] in float32."""

    rows: Rows
    out: Tensor
    lse: Tensor

    def of(self, rows: Rows) -> tuple[Tensor, Tensor]:
        mine = rows.relative_to(self.rows.start)
        return self.out[:, mine], self.lse[:, mine]


def merge_rows(parts: Sequence[RowsPart], merged_BRWND: Tensor, first_row: int) -> None:
    """Merge parts, each of some rows, into `merged_BRWND`, which begins at `first_row`; each row is rounded once."""
    ends = sorted({end for part in parts for end in (part.rows.start, part.rows.stop)})
    for rows in starmap(Rows, pairwise(ends)):
        here = [part.of(rows) for part in parts if len(part.rows.intersect(rows))]
        merged_BRWND[:, rows.relative_to(first_row)] = merge(here)[0] if len(here) > 1 else here[0][0]


def weigh(out_BLND: Tensor, lse_BLN: Tensor, maximum_BLN: Tensor) -> Tensor:
    """Terms of one part to be summed over parts or ranks: float32 [B, L, N, D + 1], contiguous.

    O_p e^(lse_p - m), then e^(lse_p - m), where m = `maximum_BLN` is the largest lse; 0 where the part has no key.
    """
    return torch.cat(_weigh(out_BLND, lse_BLN, maximum_BLN), dim=-1)


def unweigh(summed_BLND1: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention output [B, L, N, D] from the sum of `weigh` over all parts; 0 where there is no key."""
    weight_BLN1 = summed_BLND1[..., -1:]
    return (summed_BLND1[..., :-1] / weight_BLN1.masked_fill(weight_BLN1 == 0, 1.0)).to(dtype)


def _weigh(out_BLND: Tensor, lse_BLN: Tensor, reference_BLN: Tensor) -> tuple[Tensor, Tensor]:
    """(O_p w, w [B, L, N, 1]) in float32 with w = e^(lse_p - reference); both 0 where the part has no key."""
    without_key_BLN1 = lse_BLN.isneginf().unsqueeze(-1)
    weight_BLN1 = (lse_BLN - reference_BLN).exp_().unsqueeze(-1).masked_fill_(without_key_BLN1, 0.0)
    return (out_BLND.float() * weight_BLN1).masked_fill_(without_key_BLN1, 0.0), weight_BLN1
