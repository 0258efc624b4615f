"""FLUX's blocks on stripes: diffusers' arithmetic in our own order, in chunks where there are many tokens.

Only a block's class changes, and changes back; layers, names and hooks stay. Halos and shared text leave as soon as
they are projected. With few tokens a single block's MLP is computed meanwhile; with many its hidden state would be the
peak of memory, so it follows the attention, chunk by chunk. A block then holds at most five tensors of all tokens:
input, queries, keys, values and the attention's output.

Shapes: B batch, L tokens, T text tokens and R image tokens of this rank, C channels, N heads, D head dim.
"""

from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor

from clear_dist.engine.parts import Parts, chunks_of, finite, joined
from clear_dist.engine.reclassed import Classes, register_blocks
from clear_dist.engine.references import come_with_image
from clear_dist.families.flux.attention import Rotary, fill, heads_of, of_image, of_text
from clear_dist.families.flux.positions import StripedPosEmbed, YarnPosEmbed


class StripedDoubleBlock(FluxTransformerBlock):
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Image [B, R, C] and my text [B, T, C] to text and image."""
        if type(self) is FluxTransformerBlock:  # taken off, but others' hooks have kept this forward
            stock = FluxTransformerBlock.forward
            return stock(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        image, text, attn = hidden_states, encoder_hidden_states, self.attn
        text_tokens, tokens = text.shape[1], text.shape[1] + image.shape[1]
        heads = heads_of(attn, image, tokens, (joint_attention_kwargs or {}).get("attention_mask"))
        parts = heads.striped.parts
        adaptive = attn.processor.adaptive
        shift, scale, *modulation = adaptive(self.norm1, temb, 6)
        text_shift, text_scale, *text_modulation = adaptive(self.norm1_context, temb, 6)

        modulated = partial(parts.modulate, self.norm1_context.norm, shift_BC=text_shift, scale_BC=text_scale)
        fill(heads, of_text(attn), image_rotary_emb, text, modulated)
        if not (late := come_with_image(heads, text_tokens)):
            heads.start_text()
        modulated = partial(parts.modulate, self.norm1.norm, shift_BC=shift, scale_BC=scale)
        fill(heads, of_image(attn), image_rotary_emb, image, modulated, first=text_tokens)
        if late:
            heads.start_text()
        attended = heads.attend()

        out = image.new_empty(len(image), tokens, image.shape[2])
        layers = attn.to_out[0], self.norm2, self.ff
        for chunk in chunks_of(image):
            place = slice(text_tokens + chunk.start, text_tokens + chunk.stop)
            parts.add_attention_and_mlp(layers, image[:, chunk], attended[:, place], modulation, out[:, place])
        layers = attn.to_add_out, self.norm2_context, self.ff_context
        for place in chunks_of(text):
            parts.add_attention_and_mlp(layers, text[:, place], attended[:, place], text_modulation, out[:, place])
        return finite(out[:, :text_tokens]), out[:, text_tokens:]


class StripedSingleBlock(FluxSingleTransformerBlock):
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Image [B, R, C] and my text [B, T, C] to text and image."""
        if type(self) is FluxSingleTransformerBlock:  # taken off, but others' hooks have kept this forward
            stock = FluxSingleTransformerBlock.forward
            return stock(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        attn, text_tokens = self.attn, encoder_hidden_states.shape[1]
        x = joined(encoder_hidden_states, hidden_states)
        heads = heads_of(attn, x, x.shape[1], (joint_attention_kwargs or {}).get("attention_mask"))
        parts, chunks = heads.striped.parts, chunks_of(x)
        shift, scale, gate = attn.processor.adaptive(self.norm, temb, 3)
        modulated = partial(parts.modulate, self.norm.norm, shift_BC=shift, scale_BC=scale)

        normed = fill(heads, of_image(attn), image_rotary_emb, x, modulated)
        heads.start_text()
        beside = self._with_mlp(parts, normed) if len(chunks) == 1 else None
        del normed
        attended = heads.attend(None if beside is None else beside[..., : x.shape[2]])

        out = torch.empty_like(x)
        for chunk in chunks:
            if (both := beside) is None:
                both = self._with_mlp(parts, modulated(x[:, chunk]))
                both[..., : x.shape[2]] = attended[:, chunk]
            parts.add_gated(self.proj_out, x[:, chunk], both, gate, out[:, chunk])
            del both  # before the next chunk's is made
        finite(out)
        return out[:, :text_tokens], out[:, text_tokens:]

    def _with_mlp(self, parts: Parts, normed_BLC: Tensor) -> Tensor:
        """Input of the output projection, [B, L, C + hidden], its first C left for the attention's output."""
        batch, tokens, channels = normed_BLC.shape
        both = normed_BLC.new_empty(batch, tokens, channels + self.mlp_hidden_dim)
        parts.widen(self.proj_mlp, self.act_mlp, normed_BLC, both[..., channels:])
        return both


BLOCKS = {FluxTransformerBlock: StripedDoubleBlock, FluxSingleTransformerBlock: StripedSingleBlock}
register_blocks(BLOCKS)
STRIPED: Classes = {**BLOCKS, FluxPosEmbed: StripedPosEmbed}
WITH_YARN: Classes = {**BLOCKS, FluxPosEmbed: YarnPosEmbed}
