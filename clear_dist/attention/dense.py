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
    out_BNLD, lse_BNL = _kernel(query_BLND.transpose(1, 2), key_BSND.transpose(1, 2), value_BSND.transpose(1, 2), scale)
    # The memory-efficient kernel pads the log-sum-exp to a multiple of 32 queries.
    return out_BNLD.transpose(1, 2), lse_BNL[..., : query_BLND.shape[1]].transpose(1, 2).float()


def _kernel(query_BNLD: Tensor, key_BNSD: Tensor, value_BNSD: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """(out, lse) from the kernel that serves this device and dtype."""
    aten = torch.ops.aten
    if query_BNLD.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(query_BNLD, key_BNSD, value_BNSD, scale=scale)
    if query_BNLD.device.type == "cuda" and query_BNLD.dtype in (torch.bfloat16, torch.float16):
        return aten._scaled_dot_product_flash_attention(query_BNLD, key_BNSD, value_BNSD, scale=scale)[:2]
    if query_BNLD.device.type == "cuda":
        return aten._scaled_dot_product_efficient_attention(
            query_BNLD, key_BNSD, value_BNSD, attn_bias=None, compute_log_sumexp=True, scale=scale
        )[:2]
    return _math(query_BNLD, key_BNSD, value_BNSD, scale)


def _math(query_BNLD: Tensor, key_BNSD: Tensor, value_BNSD: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """For devices without a fused kernel: all scores at once, in float32."""
    factor = query_BNLD.shape[-1] ** -0.5 if scale is None else scale
    score_BNLS = (query_BNLD.float() @ key_BNSD.float().transpose(-1, -2)) * factor
    out_BNLD = score_BNLS.softmax(-1) @ value_BNSD.float()
    return out_BNLD.to(query_BNLD.dtype), score_BNLS.logsumexp(-1)
