"""SD3's attention layers on stripes: diffusers' projections and norms, ordered so that halos leave early.

Shapes: B batch, L tokens of this rank, T text tokens, C channels, N heads, D head dim.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clear_dist.engine.family import StripeProcessor, Stripes
from clear_dist.engine.heads import Heads
from clear_dist.engine.parts import Parts, chunks_of

Projections = tuple[nn.Module, nn.Module, nn.Module, nn.Module | None, nn.Module | None]
"""Projections to queries, keys and values; norms of queries and keys, if any."""


class SD3StripeAttnProcessor:
    """Recipe of `blocks.py` for blocks whose forward others have replaced: mostly hooks that bring weights."""

    def __init__(self, striped: Stripes, layer: int, still: "Still") -> None:
        self.striped = striped
        self.layer = layer
        self.still = still

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Image and text to both; without text, the second attention of some blocks, the image alone."""
        if encoder_hidden_states is None:
            heads = heads_of(attn, hidden_states, hidden_states.shape[1], attention_mask, alone=True)
            fill(heads, of_image(attn), self.still, hidden_states)
            return attn.to_out[1](attn.to_out[0](heads.attend()))
        text_tokens = encoder_hidden_states.shape[1]
        heads = heads_of(attn, hidden_states, text_tokens + hidden_states.shape[1], attention_mask)
        fill(heads, of_text(attn), self.still, encoder_hidden_states)
        heads.start_text()
        fill(heads, of_image(attn), self.still, hidden_states, first=text_tokens)
        output = heads.attend()
        text = output[:, :text_tokens]
        image = attn.to_out[1](attn.to_out[0](output[:, text_tokens:]))
        return image, text if attn.context_pre_only else attn.to_add_out(text)


class Still:
    """Cosines and sines of angles of zero, which leave heads as they are, in the kernel that norms them."""

    def __init__(self) -> None:
        self._made: tuple[Tensor, Tensor] | None = None

    def __call__(self, out_BLND: Tensor) -> tuple[Tensor, Tensor]:
        """For these tokens, [L, D] each: views of one row, made once."""
        tokens, head_dim, device = out_BLND.shape[1], out_BLND.shape[3], out_BLND.device
        if self._made is None or self._made[0].device != device:
            self._made = torch.ones(1, head_dim, device=device), torch.zeros(1, head_dim, device=device)
        cos_1D, sin_1D = self._made
        return cos_1D.expand(tokens, head_dim), sin_1D.expand(tokens, head_dim)


def heads_of(attn: Any, like_BLC: Tensor, tokens: int, mask: Tensor | None = None, *, alone: bool = False) -> Heads:
    """Buffers of an attention layer; raises ValueError where there is a mask."""
    if mask is not None:
        raise ValueError("an attention mask cannot be combined with clear_dist.parallelize; pass none")
    processor = attn.processor
    assert isinstance(processor, StripeProcessor), "put there with the block's class"
    sizes = {"tokens": tokens, "heads": attn.heads, "head_dim": attn.inner_dim // attn.heads}
    return Heads(processor.striped, processor.layer, like_BLC, **sizes, alone=alone)


def of_image(attn: Any) -> Projections:
    return attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k


def of_text(attn: Any) -> Projections:
    return attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k


def fill(
    heads: Heads,
    projections: Projections,
    still: Still,
    x_BLC: Tensor,
    modulated: Callable[[Tensor], Tensor] | None = None,
    *,
    first: int = 0,
) -> None:
    """Compute q, k and v of `x_BLC`, my tokens from `first` on, once they are `modulated`; send halos."""
    to_q, to_k, to_v, norm_q, norm_k = projections
    parts = heads.striped.parts
    query, key, value = heads.own
    for chunk in chunks_of(x_BLC):
        place = slice(first + chunk.start, first + chunk.stop)
        normed = x_BLC[:, chunk] if modulated is None else modulated(x_BLC[:, chunk])
        project(parts, to_k, norm_k, still, normed, key[:, place])
        parts.project(to_v, normed, value[:, place])
        if place.stop == key.shape[1]:
            heads.start_halos()
        project(parts, to_q, norm_q, still, normed, query[:, place])


def project(
    parts: Parts, linear: nn.Module, norm: nn.Module | None, still: Still, x_BLC: Tensor, out_BLND: Tensor
) -> None:
    """Queries or keys."""
    if norm is None:
        parts.project(linear, x_BLC, out_BLND)
    else:
        parts.rotate([(linear, norm)], x_BLC, *still(out_BLND), out_BLND)
