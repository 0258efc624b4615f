"""Text in an attention call of its own, without a mask, merged with the windows of the image.

Shape suffixes: B batch, R rows of queries, W columns, N heads, D head dim, L queries.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from clear_dist.attention.backend import WindowCall
from clear_dist.attention.dense import attend


def with_text_apart(
    call: WindowCall, in_windows: Callable[[WindowCall], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Results of a call whose queries see their own keys, its image keys by `in_windows`."""
    assert call.sees_itself  # a query without an image key has a log-sum-exp that cannot be merged here
    query_BLND = call.query.flatten(1, 2).contiguous()  # the kernels take no others' last dimension
    text = attend(query_BLND, call.key_text.contiguous(), call.value_text.contiguous(), call.scale)
    out_text, lse_text = (result.unflatten(1, call.query.shape[1:3]) for result in text)
    out, lse = in_windows(replace(call, key_text=call.key_text[:, :0], value_text=call.value_text[:, :0]))
    # As merge.merge does, for two parts that both have keys, in one pass over them.
    out_BRWND = out.float().lerp_(out_text.float(), torch.sigmoid(lse_text - lse).unsqueeze(-1)).to(out.dtype)
    return out_BRWND, torch.logaddexp(lse, lse_text)
