"""Attention on a CPU in float32, its products of matrices by oneDNN.

Shape suffixes: B batch, L queries, S keys, N heads, D head dim.
"""

from itertools import product as pairs

import torch
from torch import Tensor

from clear_dist.products import product, usable

FEWEST_QUERIES = 128
"""Fewer do not pay for packing the keys."""
FEWEST_MULTIPLICATIONS = 2**22
"""A head's queries times its keys, from which torch's kernel takes longer; by `benchmarks/speed/products.py`."""
MOST_SCORES = 2**20
"""Held at once, so that they stay in the cache, unless those of FEWEST_QUERIES are more."""


def takes(query_BNLD: Tensor, key_BNSD: Tensor) -> bool:
    """Whether this is faster than torch's fused kernel."""
    queries, head_dim = query_BNLD.shape[2:]
    is_large = queries >= FEWEST_QUERIES and queries * key_BNSD.shape[2] * head_dim >= FEWEST_MULTIPLICATIONS
    return is_large and query_BNLD.device.type in ("cpu", "meta") and usable(query_BNLD, key_BNSD)


def attend(
    query_BNLD: Tensor, key_BNSD: Tensor, value_BNSD: Tensor, scale: float | None, bias_LS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out [B, N, L, D], lse [B, N, L]), 0 and -inf where no key is seen; `bias_LS`: [L, S] or [B, 1, L, S]."""
    batch, heads, queries, head_dim = query_BNLD.shape
    scale = head_dim**-0.5 if scale is None else scale
    bias_BLS = None if bias_LS is None else bias_LS.expand(batch, 1, -1, -1)[:, 0]
    each = list(pairs(range(batch), range(heads)))
    if query_BNLD.is_meta:
        # A plan counts operations by torch's kernel, and memory by one head: all take the same.
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out_BNLD, lse_BNL = kernel(query_BNLD, key_BNSD, value_BNSD, attn_mask=bias_LS, scale=scale)
        each = each[:1]
    else:
        out_BNLD = query_BNLD.new_empty(batch, queries, heads, head_dim).transpose(1, 2)
        lse_BNL = query_BNLD.new_empty(batch, heads, queries)
    for b, n in each:
        bias = None if bias_BLS is None else bias_BLS[b]
        _attend_head(query_BNLD[b, n], key_BNSD[b, n], value_BNSD[b, n], scale, bias, out_BNLD[b, n], lse_BNL[b, n])
    return out_BNLD, lse_BNL


def _attend_head(
    query_LD: Tensor,
    key_SD: Tensor,
    value_SD: Tensor,
    scale: float,
    bias_LS: Tensor | None,
    out_LD: Tensor,
    lse_L: Tensor,
) -> None:
    key_SD, value_SD = key_SD.contiguous(), value_SD.contiguous()
    rows = max(FEWEST_QUERIES, MOST_SCORES // len(key_SD))
    for start in range(0, len(query_LD), rows):
        place = slice(start, start + rows)
        score_LS = product(query_LD[place] * scale, key_SD)
        if bias_LS is not None:
            score_LS += bias_LS[place]
        most_L = score_LS.amax(-1)
        torch._softmax(score_LS, -1, False, out=score_LS)
        torch.sub(most_L, score_LS.amax(-1).log_(), out=lse_L[place])  # the largest weight is 1 / their sum
        out_LD[place] = product(score_LS, value_SD.t())
        if bias_LS is not None:
            blind_L = most_L.isneginf()
            out_LD[place].masked_fill_(blind_L[:, None], 0)
            lse_L[place].masked_fill_(blind_L, -torch.inf)
