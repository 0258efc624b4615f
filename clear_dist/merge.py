"""Attention over parts of the keys, merged by log-sum-exp into attention over all of them.

O = sum_p O_p e^(lse_p - m) / sum_p e^(lse_p - m), where m is the largest lse_p: exact, however the keys were cut.

Shape suffixes: B batch, L queries, N heads, D head dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint sets of keys.

    Args:
        parts: pairs (out [B, L, N, D], lse [B, L, N] in float32), one per set of keys. An lse of -inf says that the
            set holds no key; such a part counts for nothing, whatever its output.

    Returns:
        (out [B, L, N, D] in the dtype of the first part, lse [B, L, N] in float32); out 0 and lse -inf where no part
        has a key.

    Raises:
        ValueError: there is no part.
    """
    if not parts:
        raise ValueError("merge needs at least one part, got none")
    maximum_BLN = torch.stack([lse for _, lse in parts]).amax(0)
    summed_BLND1 = weigh(*parts[0], maximum_BLN)
    for out, lse in parts[1:]:
        summed_BLND1 += weigh(out, lse, maximum_BLN)
    return unweigh(summed_BLND1, parts[0][0].dtype), maximum_BLN + summed_BLND1[..., -1].log()


def weigh(out_BLND: Tensor, lse_BLN: Tensor, maximum_BLN: Tensor) -> Tensor:
    """One part's term of numerator and denominator, together in one buffer that may be summed over parts or ranks.

    Args:
        out_BLND: the part's attention output.
        lse_BLN: its log-sum-exp in float32; -inf where it has no key.
        maximum_BLN: the largest lse of all parts.

    Returns:
        [B, L, N, D + 1] in float32, contiguous: O_p e^(lse_p - m), then e^(lse_p - m). 0 where the part has no key.
    """
    weight_BLN = torch.exp(lse_BLN - maximum_BLN).masked_fill(lse_BLN.isneginf(), 0.0)
    weight_BLN1 = weight_BLN.unsqueeze(-1)
    weighted_BLND = (out_BLND.float() * weight_BLN1).masked_fill(lse_BLN.isneginf().unsqueeze(-1), 0.0)
    return torch.cat([weighted_BLND, weight_BLN1], dim=-1)


def unweigh(summed_BLND1: Tensor, dtype: torch.dtype) -> Tensor:
    """The attention output [B, L, N, D] in `dtype`, from the sum of `weigh` over all parts; 0 where there is no key."""
    weight_BLN1 = summed_BLND1[..., -1:]
    return (summed_BLND1[..., :-1] / weight_BLN1.masked_fill(weight_BLN1 == 0, 1.0)).to(dtype)
