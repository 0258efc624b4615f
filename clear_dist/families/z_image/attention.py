"""Z-Image's attention layers on stripes: diffusers' projections, norms and rotation, ordered so that halos leave early.

Shapes: B batch, L tokens of this rank, text first, C channels, N heads, D head dim.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from clear_dist.engine.family import Stripes
from clear_dist.engine.heads import Heads
from clear_dist.engine.parts import Parts, chunks_of

Turned = list[tuple[slice, Tensor, Tensor]]
"""Pictures with the same positions, and these positions' cosines and sines [L, D]."""


class Turns:
    """Rotation of a forward's sequences, by cosines and sines; diffusers' complex numbers are turned into them once."""

    def __init__(self) -> None:
        self.forget(alike=True)

    def forget(self, *, alike: bool) -> None:
        """Begin a forward; `alike`: its captions take equally many places, and so all pictures' positions are equal."""
        self._alike = alike
        self._given: Tensor | None = None
        self._made: Turned = []

    def __call__(self, complex_BLF: Tensor) -> Turned:
        if complex_BLF is not self._given:
            places = [slice(None)] if self._alike else [slice(each, each + 1) for each in range(len(complex_BLF))]
            turns = [complex_BLF[place][0] for place in places]
            both = [[part.repeat_interleave(2, dim=-1) for part in (turn.real, turn.imag)] for turn in turns]
            self._given = complex_BLF
            self._made = [(place, cos, sin) for place, (cos, sin) in zip(places, both, strict=True)]
        return self._made


class ZImageStripeAttnProcessor:
    """Recipe of `blocks.py` for blocks whose forward others have replaced: mostly hooks that bring weights."""

    def __init__(self, striped: Stripes, layer: int, turns: Turns, *, sees_caption: bool) -> None:
        self.striped = striped
        self.layer = layer
        self.turns = turns
        self.sees_caption = sees_caption

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        assert attention_mask is None and freqs_cis is not None, "the engine masks, Z-Image rotates in every layer"
        heads = heads_of(attn, hidden_states)
        fill(heads, attn, hidden_states, freqs_cis)
        return attn.to_out[1](attn.to_out[0](heads.attend()))


def heads_of(attn: Any, x_BLC: Tensor) -> Heads:
    """Buffers of an attention layer; without the caption there is padding of the image, or nothing but the image."""
    processor = attn.processor
    assert isinstance(processor, ZImageStripeAttnProcessor), "put there with the block's class"
    cut, tokens = processor.striped.running_cut, x_BLC.shape[1]
    sizes = {"tokens": tokens, "heads": attn.heads, "head_dim": attn.inner_dim // attn.heads}
    alone = not processor.sees_caption and tokens == len(cut.plan.own) * cut.width
    own_text = not (processor.sees_caption or alone)
    return Heads(processor.striped, processor.layer, x_BLC, **sizes, alone=alone, own_text=own_text)


def fill(
    heads: Heads,
    attn: Any,
    x_BLC: Tensor,
    complex_BLF: Tensor,
    modulated: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Compute q, k and v of `x_BLC`, and send halos and text; without `modulated`, the stock block has modulated it."""
    parts, turned = heads.striped.parts, attn.processor.turns(complex_BLF)
    query, key, value = heads.own
    for place in chunks_of(x_BLC):
        normed = x_BLC[:, place] if modulated is None else modulated(x_BLC[:, place])
        rotate(parts, attn.to_k, attn.norm_k, normed, turned, place, key)
        parts.project(attn.to_v, normed, value[:, place])
        if place.stop == x_BLC.shape[1]:
            heads.start_halos()
        rotate(parts, attn.to_q, attn.norm_q, normed, turned, place, query)
    heads.start_text()


def rotate(
    parts: Parts, linear: nn.Module, norm: nn.Module, x_BLC: Tensor, turned: Turned, place: slice, out_BLND: Tensor
) -> None:
    """Queries or keys of the tokens at `place`, by the turns of each picture."""
    for pictures, cos_LD, sin_LD in turned:
        parts.rotate([(linear, norm)], x_BLC[pictures], cos_LD[place], sin_LD[place], out_BLND[pictures, place])
