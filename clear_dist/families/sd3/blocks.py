"""SD3's blocks on stripes: diffusers' arithmetic in our own order, in chunks where there are many tokens.

Only a block's class changes, and changes back; layers, names and hooks stay. Halos and shared text leave as soon as
they are projected; the MLP's hidden state, four times as wide, is there for a chunk at a time.

Shapes: B batch, L tokens, T text tokens and R image tokens of this rank, C channels, N heads, D head dim.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import JointTransformerBlock
from torch import Tensor, nn

from clear_dist.engine.parts import Parts, chunks_of
from clear_dist.engine.reclassed import Classes, register_blocks
from clear_dist.families.sd3.attention import fill, heads_of, of_image, of_text

Modulation = Sequence[Tensor]
"""Shifts, scales and gates, [B, C] each."""


class StripedJointBlock(JointTransformerBlock):
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """Image [B, R, C] and my text [B, T, C] to text and image; the last block has no use for text."""
        if type(self) is JointTransformerBlock:  # taken off, but others' hooks have kept this forward
            stock = JointTransformerBlock.forward
            return stock(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
        image, text, attn = hidden_states, encoder_hidden_states, self.attn
        text_tokens = text.shape[1]
        heads = heads_of(attn, image, text_tokens + image.shape[1])
        parts, still, activated = heads.striped.parts, attn.processor.still, self.norm1.silu(temb)
        shift, scale, gate, *mlp = self.norm1.linear(activated).chunk(9 if self.use_dual_attention else 6, dim=1)
        mlp, second = mlp[:3], mlp[3:]
        of_my_text = self.norm1_context.linear(activated).chunk(2 if self.context_pre_only else 6, dim=1)
        text_shift, text_scale = of_my_text[1::-1] if self.context_pre_only else of_my_text[:2]

        modulated = partial(parts.modulate, self.norm1_context.norm, shift_BC=text_shift, scale_BC=text_scale)
        fill(heads, of_text(attn), still, text, modulated)
        heads.start_text()
        modulated = partial(parts.modulate, self.norm1.norm, shift_BC=shift, scale_BC=scale)
        fill(heads, of_image(attn), still, image, modulated, first=text_tokens)
        attended = heads.attend()

        if self.use_dual_attention:
            image = self._with_second(parts, image, attended[:, text_tokens:], gate, second, mlp)
        else:
            image = self._with_mlp(parts, attn.to_out[0], image, attended[:, text_tokens:], (gate, *mlp))
        if self.context_pre_only:
            return None, image
        out, layers = torch.empty_like(text), (attn.to_add_out, self.norm2_context, self.ff_context)
        for place in chunks_of(text):
            parts.add_attention_and_mlp(layers, text[:, place], attended[:, place], of_my_text[2:], out[:, place])
        return out, image

    def _with_mlp(self, parts: Parts, to_out: nn.Module, x_BRC: Tensor, attended_BRC: Tensor, by: Modulation) -> Tensor:
        """Image with its gated attention and MLP added; `by`: a gate, then shift, scale and gate."""
        out = torch.empty_like(x_BRC)
        for place in chunks_of(x_BRC):
            layers = to_out, self.norm2, self.ff
            parts.add_attention_and_mlp(layers, x_BRC[:, place], attended_BRC[:, place], by, out[:, place])
        return out

    def _with_second(
        self, parts: Parts, x_BRC: Tensor, attended_BRC: Tensor, gate_BC: Tensor, second: Modulation, mlp: Modulation
    ) -> Tensor:
        """Image with both attentions and the MLP added; the second one sees what the first one saw."""
        shift, scale, second_gate = second
        heads = heads_of(self.attn2, x_BRC, x_BRC.shape[1], alone=True)
        modulated = partial(parts.modulate, self.norm1.norm, shift_BC=shift, scale_BC=scale)
        fill(heads, of_image(self.attn2), self.attn2.processor.still, x_BRC, modulated)
        out = torch.empty_like(x_BRC)
        for place in chunks_of(x_BRC):
            parts.add_gated(self.attn.to_out[0], x_BRC[:, place], attended_BRC[:, place], gate_BC, out[:, place])
        return self._with_mlp(parts, self.attn2.to_out[0], out, heads.attend(), (second_gate, *mlp))


STRIPED: Classes = {JointTransformerBlock: StripedJointBlock}
register_blocks(STRIPED)
