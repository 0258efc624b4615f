"""Dense attention with its log-sum-exp, which PyTorch's own does not return, for text queries.

They are few and their keys many, so on a GPU the keys are cut in pieces that are attended to side by side, which keeps
all its processors busy, and merged as the parts of several ranks are.

Shape suffixes: B batch, L queries, S keys, N heads, D head dim.
"""

import torch
from torch import Tensor

from clear_dist.attention import onednn
from clear_dist.attention.backend import is_before_ampere
from clear_dist.merge import merge

QUERY_BLOCK = 128
BLOCKS_PER_PROCESSOR = 8
"""Enough that the last ones leave little idle."""
SHORTEST_PIECE = 8192
"""Keys worth a piece of their own."""
BIAS_ALIGNMENT = 8
"""Elements; asked for in a mask's rows by PyTorch's memory-efficient kernel."""


def attend(
    query_BLND: Tensor, key_BSND: Tensor, value_BSND: Tensor, scale: float | None = None, *, pieces: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention to every key, in `pieces` of keys (None: as suits the device); `scale` None: 1 / sqrt(D).

    Returns (out [B, L, N, D] in the queries' dtype, lse [B, L, N] in float32); 0 and -inf without keys (S = 0).
    """
    if query_BLND.numel() == 0 or key_BSND.shape[1] == 0:
        # The kernels divide by these sizes.
        return torch.zeros_like(query_BLND), query_BLND.new_full(query_BLND.shape[:3], -torch.inf, dtype=torch.float32)
    pieces = min(_pieces(query_BLND, key_BSND) if pieces is None else pieces, key_BSND.shape[1])
    if pieces > 1:
        return _attend_in_pieces(query_BLND, key_BSND, value_BSND, scale, pieces)
    return heads_last(*fused(query_BLND.transpose(1, 2), key_BSND.transpose(1, 2), value_BSND.transpose(1, 2), scale))


def attend_masked(
    query_BLND: Tensor, key_BSND: Tensor, value_BSND: Tensor, scale: float | None, mask_BS: Tensor
) -> tuple[Tensor, Tensor]:
    """`attend` without the keys at False of the mask."""
    batch, keys = mask_BS.shape
    if query_BLND.numel() == 0 or keys == 0:
        return attend(query_BLND, key_BSND, value_BSND, scale)
    bias_B11S = query_BLND.new_zeros(batch, 1, 1, keys + -keys % BIAS_ALIGNMENT)[..., :keys]
    bias_B11S.masked_fill_(~mask_BS[:, None, None], -torch.inf)
    bias_B1LS = bias_B11S.expand(-1, -1, query_BLND.shape[1], -1)
    results = fused(query_BLND.transpose(1, 2), key_BSND.transpose(1, 2), value_BSND.transpose(1, 2), scale, bias_B1LS)
    out_BLND, lse_BLN = heads_last(*results)
    hidden_B1 = ~mask_BS.any(dim=1, keepdim=True)  # the kernels return anything where no key is seen
    return out_BLND.masked_fill(hidden_B1[..., None, None], 0), lse_BLN.masked_fill(hidden_B1[..., None], -torch.inf)


def _pieces(query_BLND: Tensor, key_BSND: Tensor) -> int:
    if query_BLND.device.type != "cuda":
        return 1
    batch, queries, heads, _ = query_BLND.shape
    processors = torch.cuda.get_device_properties(query_BLND.device).multi_processor_count
    return count_pieces(batch * heads * -(-queries // QUERY_BLOCK), key_BSND.shape[1], processors)


def count_pieces(blocks: int, keys: int, processors: int) -> int:
    """Pieces of keys that give each processor of a GPU enough blocks."""
    return max(1, min(-(-BLOCKS_PER_PROCESSOR * processors // blocks), keys // SHORTEST_PIECE))


def _attend_in_pieces(
    query_BLND: Tensor, key_BSND: Tensor, value_BSND: Tensor, scale: float | None, pieces: int
) -> tuple[Tensor, Tensor]:
    """Attention to pieces of equal length, side by side in the batch, and to the few keys that are left."""
    batch, keys = key_BSND.shape[:2]
    length = keys // pieces

    def cut(x_BSND: Tensor) -> Tensor:
        # No copy for a batch of one.
        return x_BSND[:, : pieces * length].unflatten(1, (pieces, length)).flatten(0, 1)

    queries = query_BLND.unsqueeze(1).expand(-1, pieces, -1, -1, -1).flatten(0, 1)
    out, lse = attend(queries, cut(key_BSND), cut(value_BSND), scale, pieces=1)
    parts = list(zip(*(result.unflatten(0, (batch, pieces)).unbind(1) for result in (out, lse)), strict=True))
    rest = slice(pieces * length, keys)
    return merge([*parts, attend(query_BLND, key_BSND[:, rest], value_BSND[:, rest], scale, pieces=1)])


def heads_last(out_BNLD: Tensor, lse_BNL: Tensor) -> tuple[Tensor, Tensor]:
    """(out [B, L, N, D], lse [B, L, N] in float32) from what `fused` returns."""
    # The memory-efficient kernel pads the log-sum-exp to a multiple of 32 queries.
    return out_BNLD.transpose(1, 2), lse_BNL[..., : out_BNLD.shape[2]].transpose(1, 2).float()


def fused(
    query_BNLD: Tensor, key_BNSD: Tensor, value_BNSD: Tensor, scale: float | None, bias_LS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) from the kernel for this device and dtype.

    The bias of the scores, [L, S] or [B, 1, L, S], has the queries' dtype and on CUDA rows aligned by BIAS_ALIGNMENT.
    """
    aten = torch.ops.aten
    device_type, dtype = query_BNLD.device.type, query_BNLD.dtype
    if onednn.takes(query_BNLD, key_BNSD):
        return onednn.attend(query_BNLD, key_BNSD, value_BNSD, scale, bias_LS)
    if device_type in ("cpu", "meta"):
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query_BNLD, key_BNSD, value_BNSD, attn_mask=bias_LS, scale=scale
        )
    if device_type != "cuda" or query_BNLD.shape[-1] % 8 or dtype == torch.float64:
        return _math(query_BNLD, key_BNSD, value_BNSD, scale, bias_LS)
    if bias_LS is None and dtype != torch.float32 and not is_before_ampere(device_type):
        return aten._scaled_dot_product_flash_attention(query_BNLD, key_BNSD, value_BNSD, scale=scale)[:2]
    bias_BNLS = None if bias_LS is None else bias_LS.expand(*query_BNLD.shape[:2], -1, -1)
    return aten._scaled_dot_product_efficient_attention(
        query_BNLD, key_BNSD, value_BNSD, attn_bias=bias_BNLS, compute_log_sumexp=True, scale=scale
    )[:2]


def _math(
    query_BNLD: Tensor, key_BNSD: Tensor, value_BNSD: Tensor, scale: float | None, bias_LS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All scores at once, in float32, where no fused kernel serves."""
    factor = query_BNLD.shape[-1] ** -0.5 if scale is None else scale
    score_BNLS = (query_BNLD.float() @ key_BNSD.float().transpose(-1, -2)) * factor
    if bias_LS is not None:
        score_BNLS += bias_LS
    out_BNLD = score_BNLS.softmax(-1) @ value_BNSD.float()
    return out_BNLD.to(query_BNLD.dtype), score_BNLS.logsumexp(-1)
