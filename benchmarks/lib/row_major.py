"""CLEAR as its official code computes it: FlexAttention compiled, tokens in raster order, blocks of 128.

One call computes a layer: text tokens come first, then the image row by row.

Shape suffixes: B batch, L text and image tokens, N heads, D head dim, Q blocks of queries, K blocks of keys.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
GEOMETRIES = 64
"""Number of masks that may be compiled; Dynamo's own limit is 8."""


def row_major_mask(grid: tuple[int, int], text: int, radius: int, device: torch.device) -> BlockMask:
    """The block mask of the official mask function, as `create_block_mask` makes it, without memory for L x L.

    Args:
        grid: height and width in tokens.
        text: number of text tokens.
    """
    width, length = grid[1], text + grid[0] * grid[1]
    blocks = -(-length // BLOCK)

    def sees(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
        down = (query - text) // width - (key - text) // width
        across = (query - text) % width - (key - text) % width
        return (query < text) | (key < text) | (down**2 + across**2 < radius**2)

    position = torch.arange(blocks * BLOCK, device=device)
    exists = position < length
    seen = []
    for query in position.split(BLOCK):
        pairs = sees(0, 0, query[:, None], position) & exists & exists[query][:, None]
        seen.append(pairs.unflatten(1, (blocks, BLOCK)).sum((0, 2)))
    seen_QK = torch.stack(seen)
    whole_QK = seen_QK == BLOCK**2
    partial, whole = _table((seen_QK > 0) & ~whole_QK), _table(whole_QK)
    return BlockMask.from_kv_blocks(
        *partial, *whole, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length), compute_q_blocks=False
    )


def _table(chosen_QK: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of chosen blocks [1, 1, Q] and indices [1, 1, Q, K] in int32, the chosen ones first."""
    order = chosen_QK.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return chosen_QK.sum(1).int()[None, None], order.int()[None, None]


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def row_major_attention(query_BLND: Tensor, key_BLND: Tensor, value_BLND: Tensor, mask: BlockMask) -> Tensor:
    """CLEAR's attention [B, L, N, D] of all tokens in one call."""
    with torch._dynamo.config.patch(recompile_limit=GEOMETRIES):
        query, key, value = (x.transpose(1, 2) for x in (query_BLND, key_BLND, value_BLND))
        return _compiled()(query, key, value, block_mask=mask).transpose(1, 2)


class RowMajorProcessor:
    """diffusers' attention processor for FLUX with another kernel."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, mask: BlockMask) -> None:
        self._mask = mask

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1))

        query = attn.norm_q(heads(attn.to_q(hidden_states)))
        key = attn.norm_k(heads(attn.to_k(hidden_states)))
        value = heads(attn.to_v(hidden_states))
        if encoder_hidden_states is not None:
            query = torch.cat([attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states))), query], dim=1)
            key = torch.cat([attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states))), key], dim=1)
            value = torch.cat([heads(attn.add_v_proj(encoder_hidden_states)), value], dim=1)
        query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        output = row_major_attention(query, key, value, self._mask).flatten(2)
        if encoder_hidden_states is None:
            return output
        text, image = output.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](image.contiguous())), attn.to_add_out(text.contiguous())
