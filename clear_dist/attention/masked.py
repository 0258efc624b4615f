"""Windowed attention of a whole call at once under a mask, by PyTorch's own attention.

For images not much larger than their circles; one mask is kept for all layers, heads and steps.

Shape suffixes: B batch, R rows of queries, E rows of keys, W columns, N heads, T text tokens, D head dim, L queries,
S text and image keys.
"""

from functools import lru_cache

import torch
from torch import Tensor

from clear_dist.attention.backend import Backend, CallShape, Geometry, WindowCall
from clear_dist.attention.dense import BIAS_ALIGNMENT, fused, heads_last

MOST_MASK_BYTES = 2**27
"""Limit of one mask; 64 x 64 image tokens and 512 text tokens take 75 MB in float32."""
MASKS_KEPT = 3
"""Own keys and two halos."""


def run(call: WindowCall) -> tuple[Tensor, Tensor]:
    grid = call.query.shape[1:3]
    key_BSND, value_BSND = (
        torch.cat([text, image.flatten(1, 2)], dim=1)
        for text, image in ((call.key_text, call.key), (call.value_text, call.value))
    )
    out_BLND, lse_BLN = heads_last(
        *fused(
            call.query.flatten(1, 2).contiguous().transpose(1, 2),  # the kernels take no others' last dimension
            key_BSND.transpose(1, 2),
            value_BSND.transpose(1, 2),
            call.scale,
            bias(call.geometry, call.query.dtype, call.query.device),
        )
    )
    return out_BLND.unflatten(1, grid), lse_BLN.unflatten(1, grid)


@lru_cache(maxsize=MASKS_KEPT)
def bias(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Bias of the scores, [L, S]: 0 where a query sees a key, else -inf."""
    row, column = torch.arange(geometry.rows, device=device), torch.arange(geometry.columns, device=device)
    down_RE = row[:, None] + geometry.row_offset - torch.arange(geometry.key_rows, device=device)
    across_WW = column[:, None] - column
    left_RE = geometry.radius**2 - down_RE.square()
    hidden_RWEW = across_WW.square()[None, :, None, :] >= left_RE[:, None, :, None]
    keys = geometry.text + geometry.key_rows * geometry.columns
    bias_LS = torch.zeros(geometry.rows * geometry.columns, keys + -keys % BIAS_ALIGNMENT, dtype=dtype, device=device)
    bias_LS = bias_LS[:, :keys]
    bias_LS[:, geometry.text :].masked_fill_(hidden_RWEW.flatten(0, 1).flatten(1, 2), -torch.inf)
    return bias_LS


def why_not(shape: CallShape) -> str | None:
    if not shape.dtype.is_floating_point:
        return f"it takes floating-point numbers only, got {shape.dtype}"
    mask_bytes = shape.queries * shape.keys * shape.dtype.itemsize
    if mask_bytes > MOST_MASK_BYTES:
        return f"its mask would take {mask_bytes / 2**20:.0f} MiB, at most {MOST_MASK_BYTES / 2**20:.0f}"
    return None


BACKEND = Backend("masked", why_not, run)
