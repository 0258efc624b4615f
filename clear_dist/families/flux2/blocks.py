"""FLUX.2's blocks on stripes, as FLUX.1's (`families/flux/blocks.py`): shared modulation, SwiGLU, fused projections.

Shapes: B batch, L tokens, T text tokens and R image tokens of this rank, C channels, H hidden channels of the MLP.
"""

from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock, Flux2TransformerBlock
from torch import Tensor, nn

from clear_dist.engine.parts import Parts, chunks_of, finite, joined
from clear_dist.engine.reclassed import Classes, register_blocks
from clear_dist.engine.references import come_with_image
from clear_dist.families.flux.attention import Rotary, fill, heads_of, of_image, of_text
from clear_dist.families.flux2.attention import fill_beside, pieces_of, room_beside


class StripedDoubleBlock(Flux2TransformerBlock):
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb_mod_img: Tensor,
        temb_mod_txt: Tensor,
        image_rotary_emb: Rotary,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Image [B, R, C] and my text [B, T, C] to text and image; modulation [B, 6 C] each."""
        given = temb_mod_img, temb_mod_txt, image_rotary_emb, joint_attention_kwargs
        if type(self) is Flux2TransformerBlock:  # taken off, but others' hooks have kept this forward
            return Flux2TransformerBlock.forward(self, hidden_states, encoder_hidden_states, *given)
        image, text, attn = hidden_states, encoder_hidden_states, self.attn
        text_tokens, tokens = text.shape[1], text.shape[1] + image.shape[1]
        heads = heads_of(attn, image, tokens, (joint_attention_kwargs or {}).get("attention_mask"))
        parts = heads.striped.parts
        shift, scale, *modulation = temb_mod_img.chunk(6, dim=-1)
        text_shift, text_scale, *text_modulation = temb_mod_txt.chunk(6, dim=-1)

        modulated = partial(parts.modulate, self.norm1_context, shift_BC=text_shift, scale_BC=text_scale)
        fill(heads, of_text(attn), image_rotary_emb, text, modulated)
        if not (late := come_with_image(heads, text_tokens)):
            heads.start_text()
        modulated = partial(parts.modulate, self.norm1, shift_BC=shift, scale_BC=scale)
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


class StripedSingleBlock(Flux2SingleTransformerBlock):
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        temb_mod: Tensor,
        image_rotary_emb: Rotary,
        joint_attention_kwargs: dict[str, Any] | None = None,
        split_hidden_states: bool = False,
        text_seq_len: int | None = None,
    ) -> Any:
        """My tokens [B, L, C], text first, to the same; apart where it is asked for. Modulation [B, 3 C]."""
        given = temb_mod, image_rotary_emb, joint_attention_kwargs, split_hidden_states, text_seq_len
        if type(self) is Flux2SingleTransformerBlock:  # taken off, but others' hooks have kept this forward
            return Flux2SingleTransformerBlock.forward(self, hidden_states, encoder_hidden_states, *given)
        x = hidden_states if encoder_hidden_states is None else joined(encoder_hidden_states, hidden_states)
        attn, width = self.attn, self.attn.inner_dim
        heads = heads_of(attn, x, x.shape[1], (joint_attention_kwargs or {}).get("attention_mask"))
        parts, chunks, pieces = heads.striped.parts, chunks_of(x), pieces_of(attn)
        shift, scale, gate = temb_mod.chunk(3, dim=-1)
        modulated = partial(parts.modulate, self.norm, shift_BC=shift, scale_BC=scale)

        beside = room_beside(attn, x) if pieces is None or len(chunks) == 1 else None
        if pieces is None:
            assert beside is not None
            fill_beside(heads, attn, image_rotary_emb, x, modulated, beside)
        else:
            projections = (*pieces[:3], attn.norm_q, attn.norm_k)
            normed = fill(heads, projections, image_rotary_emb, x, modulated)
            heads.start_text()
            if beside is not None:
                parts.widen(pieces[3], attn.mlp_act_fn, normed, beside[..., width:])
            del normed
        attended = heads.attend(None if beside is None else beside[..., :width])

        out = torch.empty_like(x)
        for chunk in chunks:
            both = beside[:, chunk] if beside is not None else None
            if both is None:
                assert pieces is not None
                both = _with_mlp(parts, attn, pieces[3], modulated(x[:, chunk]))
                both[..., :width] = attended[:, chunk]
            parts.add_gated(attn.to_out, x[:, chunk], both, gate, out[:, chunk])
            del both  # before the next chunk's is made
        finite(out)
        text = encoder_hidden_states.shape[1] if encoder_hidden_states is not None else text_seq_len
        return (out[:, :text], out[:, text:]) if split_hidden_states else out


def _with_mlp(parts: Parts, attn: Any, to_mlp: nn.Module, normed_BLC: Tensor) -> Tensor:
    """Input of the output projection, its first C left for the attention's output."""
    both = room_beside(attn, normed_BLC)
    parts.widen(to_mlp, attn.mlp_act_fn, normed_BLC, both[..., attn.inner_dim :])
    return both


STRIPED: Classes = {Flux2TransformerBlock: StripedDoubleBlock, Flux2SingleTransformerBlock: StripedSingleBlock}
register_blocks(STRIPED)
