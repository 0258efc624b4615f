"""FLUX's attention layers on stripes: diffusers' projections, norms and rotation, ordered so that halos leave early.

Shapes: B batch, L tokens of this rank, C channels, N heads, D head dim.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from clear_dist.engine.family import StripeProcessor, Stripes
from clear_dist.engine.heads import Heads
from clear_dist.engine.parts import chunks_of

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of all positions, text first, [L, D] each."""
Projections = tuple[nn.Module, nn.Module, nn.Module, nn.Module, nn.Module]
"""To queries, keys and values; the norms of queries and of keys."""


class FluxStripeAttnProcessor:
    """The recipe of the blocks (`blocks.py`), for those that keep a forward of others.

    Hooks that bring a block's weights put such a forward on it, mostly.
    """

    def __init__(self, striped: Stripes | None = None, layer: int = 0) -> None:
        """
        Raises:
            ValueError: nothing is given: `load_ip_adapter` makes processors anew, by their classes alone.
        """
        if striped is None:
            raise ValueError("IP-Adapters cannot be combined with clear_dist.parallelize; undo() it first")
        self.striped = striped
        self.layer = layer

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Double blocks pass the text apart and get two outputs; single blocks pass both joined, text first.

        Raises:
            ValueError: an attention mask is given; windows and stripes have no place for it.
        """
        assert image_rotary_emb is not None, "FLUX rotates in every layer"
        text_tokens = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        heads = heads_of(attn, hidden_states, text_tokens + hidden_states.shape[1], attention_mask)
        if encoder_hidden_states is not None:
            fill(heads, of_text(attn), image_rotary_emb, encoder_hidden_states)
            heads.start_text()
        fill(heads, of_image(attn), image_rotary_emb, hidden_states, first=text_tokens)
        if encoder_hidden_states is None:
            heads.start_text()
            return heads.attend()
        output = heads.attend()
        image = attn.to_out[1](attn.to_out[0](output[:, text_tokens:]))
        return image, attn.to_add_out(output[:, :text_tokens])


def heads_of(attn: Any, like_BLC: Tensor, tokens: int, mask: Tensor | None = None) -> Heads:
    """Room for an attention layer's queries, keys and values.

    Raises:
        ValueError: there is a mask.
    """
    if mask is not None:
        raise ValueError("an attention mask cannot be combined with clear_dist.parallelize; pass none")
    processor = attn.processor
    assert isinstance(processor, StripeProcessor), "put there with the block's class"
    return Heads(processor.striped, processor.layer, like_BLC, tokens=tokens, heads=attn.heads, head_dim=attn.head_dim)


def of_image(attn: Any) -> Projections:
    """Projections of image tokens; of all tokens in single blocks."""
    return attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k


def of_text(attn: Any) -> Projections:
    """Projections of text tokens in double blocks."""
    return attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k


def unmodulated(x_BLC: Tensor) -> Tensor:
    """What the stock block has modulated already."""
    return x_BLC


def fill(
    heads: Heads,
    projections: Projections,
    rotary: Rotary,
    x_BLC: Tensor,
    modulated: Callable[[Tensor], Tensor] = unmodulated,
    *,
    first: int = 0,
) -> Tensor:
    """Compute queries, keys and values of `x_BLC`; halos leave with the image's, which ends where all tokens do.

    Args:
        modulated: what is projected of a chunk.
        first: where `x_BLC` begins among my tokens.

    Returns:
        The last chunk [B, L, C], modulated.
    """
    to_q, to_k, to_v, norm_q, norm_k = projections
    parts = heads.striped.parts
    query, key, value = heads.own
    normed = x_BLC  # of no token, on a rank whose share of the text is empty
    for chunk in chunks_of(x_BLC):
        place = slice(first + chunk.start, first + chunk.stop)
        turns = rotary[0][place], rotary[1][place]
        normed = modulated(x_BLC[:, chunk])
        parts.rotate(to_k, norm_k, normed, *turns, key[:, place])
        parts.project(to_v, normed, value[:, place])
        if place.stop == key.shape[1]:
            heads.start_halos()
        parts.rotate(to_q, norm_q, normed, *turns, query[:, place])
    return normed
