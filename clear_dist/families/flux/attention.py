"""FLUX's attention layers on stripes: diffusers' projections, norms and rotation, ordered so that halos leave early.

Shapes: B batch, L tokens of this rank, C channels, N heads, D head dim.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from clear_dist.engine.family import StripeProcessor, Stripes
from clear_dist.engine.heads import Heads
from clear_dist.engine.parts import chunks_of
from clear_dist.engine.references import come_with_image

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of all positions, text first, [L, D] each."""
Projections = tuple[nn.Module, nn.Module, nn.Module, nn.Module, nn.Module]
"""Projections to queries, keys and values; norms of queries and keys."""


class FluxStripeAttnProcessor:
    """Recipe of `blocks.py` for blocks whose forward others have replaced: mostly hooks that bring weights."""

    def __init__(self, striped: Stripes | None = None, layer: int = 0, adaptive: "Adaptive | None" = None) -> None:
        """Raises ValueError without arguments: `load_ip_adapter` makes processors anew from their classes."""
        if striped is None:
            raise ValueError("IP-Adapters cannot be combined with clear_dist.parallelize; undo() it first")
        self.striped = striped
        self.layer = layer
        self.adaptive = adaptive or Adaptive()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Double blocks pass text apart and get two outputs, single blocks pass all joined; masks raise ValueError."""
        assert image_rotary_emb is not None, "FLUX rotates in every layer"
        text_tokens = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        heads = heads_of(attn, hidden_states, text_tokens + hidden_states.shape[1], attention_mask)
        if encoder_hidden_states is not None:
            fill(heads, of_text(attn), image_rotary_emb, encoder_hidden_states)
        late = encoder_hidden_states is None or come_with_image(heads, text_tokens)
        if not late:
            heads.start_text()
        fill(heads, of_image(attn), image_rotary_emb, hidden_states, first=text_tokens)
        if late:
            heads.start_text()
        output = heads.attend()
        if encoder_hidden_states is None:
            return output
        image = attn.to_out[1](attn.to_out[0](output[:, text_tokens:]))
        return image, attn.to_add_out(output[:, :text_tokens])


class Adaptive:
    """AdaLN of all blocks, whose linear layers take the same silu of a forward's embedding: computed once."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin a forward: its embedding may be the last one's tensor, with other values."""
        self._embedding: Tensor | None = None
        self._activated: Tensor | None = None

    def __call__(self, norm: Any, embedding_BC: Tensor, count: int) -> Sequence[Tensor]:
        """A norm's shifts, scales and gates, [B, C] each."""
        if embedding_BC is not self._embedding:
            self._embedding, self._activated = embedding_BC, norm.silu(embedding_BC)
        return norm.linear(self._activated).chunk(count, dim=1)


def heads_of(attn: Any, like_BLC: Tensor, tokens: int, mask: Tensor | None = None) -> Heads:
    """Buffers of an attention layer; raises ValueError where there is a mask."""
    if mask is not None:
        raise ValueError("an attention mask cannot be combined with clear_dist.parallelize; pass none")
    processor = attn.processor
    assert isinstance(processor, StripeProcessor), "put there with the block's class"
    return Heads(processor.striped, processor.layer, like_BLC, tokens=tokens, heads=attn.heads, head_dim=attn.head_dim)


def of_image(attn: Any) -> Projections:
    """Projections of image tokens; of all tokens in single blocks."""
    return attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k


def of_text(attn: Any) -> Projections:
    return attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k


def fill(
    heads: Heads,
    projections: Projections,
    rotary: Rotary,
    x_BLC: Tensor,
    modulated: Callable[[Tensor], Tensor] | None = None,
    *,
    first: int = 0,
) -> Tensor:
    """Compute q, k and v of `x_BLC`, my tokens from `first` on, and send halos; returns the last chunk, `modulated`.

    Without `modulated`, the stock block has modulated `x_BLC` already.
    """
    to_q, to_k, to_v, norm_q, norm_k = projections
    parts, keys, queries = heads.striped.parts, (to_k, norm_k), (to_q, norm_q)
    query, key, value = heads.own
    normed = x_BLC  # returned where there are no tokens: an empty share of the text
    for chunk in chunks_of(x_BLC):
        place = slice(first + chunk.start, first + chunk.stop)
        turns = rotary[0][place], rotary[1][place]
        normed = x_BLC[:, chunk] if modulated is None else modulated(x_BLC[:, chunk])
        is_last = place.stop == key.shape[1]
        if is_last and heads.has_others:  # queries follow what leaves
            parts.rotate([keys], normed, *turns, key[:, place])
        else:
            parts.rotate([keys, queries], normed, *turns, key[:, place], query[:, place])
        parts.project(to_v, normed, value[:, place])
        if is_last:
            heads.start_halos()
            if heads.has_others:
                parts.rotate([queries], normed, *turns, query[:, place])
    return normed
