"""Dense attention that also returns its log-sum-exp: what text queries need, whose keys lie on several ranks.

`torch.nn.functional.scaled_dot_product_attention` does not return it; the kernels that it chooses from do.

Shape suffixes: B batch, L queries, S keys, N heads, D head dim.
"""

import torch
from torch import Tensor


def attend(
    query_BLND: Tensor, key_BSND: Tensor, value_BSND: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of every query to every key.

    Args:
        scale: factor of the scores; None: 1 / sqrt(D).

    Returns:
        (out [B, L, N, D] in the dtype of the queries, lse [B, L, N] in float32). Without keys (S = 0) out is 0 and
        lse is -inf, which `clear_dist.merge` takes for "no key".
    """
    if query_BLND.numel() == 0 or key_BSND.shape[1] == 0:
        # The kernels divide by these sizes.
        return torch.zeros_like(query_BLND), query_BLND.new_full(query_BLND.shape[:3], -torch.inf, dtype=torch.float32)
    return heads_last(*fused(query_BLND.transpose(1, 2), key_BSND.transpose(1, 2), value_BSND.transpose(1, 2), scale))


def heads_last(out_BNLD: Tensor, lse_BNL: Tensor) -> tuple[Tensor, Tensor]:
    """(out [B, L, N, D], lse [B, L, N] in float32) from what `fused` returns."""
    # The memory-efficient kernel pads the log-sum-exp to a multiple of 32 queries.
    return out_BNLD.transpose(1, 2), lse_BNL[..., : out_BNLD.shape[2]].transpose(1, 2).float()


def fused(
    query_BNLD: Tensor, key_BNSD: Tensor, value_BNSD: Tensor, scale: float | None, bias_LS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) from the kernel that serves this device and dtype.

    Args:
        bias_LS: is added to the scores, in the dtype of the queries; some key of each query must not be at -inf. On
            CUDA its rows must begin at multiples of 8 elements.
    """
    aten = torch.ops.aten
    device_type, dtype = query_BNLD.device.type, query_BNLD.dtype
    if device_type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query_BNLD, key_BNSD, value_BNSD, attn_mask=bias_LS, scale=scale
        )
    if device_type != "cuda" or query_BNLD.shape[-1] % 8 or dtype == torch.float64:
        return _math(query_BNLD, key_BNSD, value_BNSD, scale, bias_LS)
    if bias_LS is None and dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(query_BNLD, key_BNSD, value_BNSD, scale=scale)[:2]
    bias_BNLS = None if bias_LS is None else bias_LS.expand(*query_BNLD.shape[:2], -1, -1)
    return aten._scaled_dot_product_efficient_attention(
        query_BNLD, key_BNSD, value_BNSD, attn_bias=bias_BNLS, compute_log_sumexp=True, scale=scale
    )[:2]


def _math(
    query_BNLD: Tensor, key_BNSD: Tensor, value_BNSD: Tensor, scale: float | None, bias_LS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For what no fused kernel takes: all scores at once, in float32."""
    factor = query_BNLD.shape[-1] ** -0.5 if scale is None else scale
    score_BNLS = (query_BNLD.float() @ key_BNSD.float().transpose(-1, -2)) * factor
    if bias_LS is not None:
        score_BNLS += bias_LS
    out_BNLD = score_BNLS.softmax(-1) @ value_BNSD.float()
    return out_BNLD.to(query_BNLD.dtype), score_BNLS.logsumexp(-1)
