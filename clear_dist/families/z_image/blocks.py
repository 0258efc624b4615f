"""Z-Image's blocks that see the image, on stripes: diffusers' arithmetic, in chunks where there are many tokens.

Only a block's class changes, and changes back; layers, names and hooks stay. Halos leave as soon as keys and values are
there. The feed-forward layer's hidden states, of which four are alive at once, each 2.7 times as wide as a token, would
be the peak of memory: it runs chunk by chunk.

Shapes: B batch, L tokens of this rank, text first, C channels, F complex numbers of a position.
"""

from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from torch import Tensor

from clear_dist.engine.parts import chunks_of
from clear_dist.engine.reclassed import Classes, register_blocks
from clear_dist.families.z_image.attention import fill, heads_of

STATES = 4
"""Hidden states of a feed-forward layer that are alive at once."""


class StripedZImageBlock(ZImageTransformerBlock):
    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        freqs_cis: Tensor,
        adaln_input: Tensor | None = None,
        *omni: Any,
    ) -> Tensor:
        """Tokens [B, L, C] and their turns [B, L, F] to tokens."""
        if type(self) is ZImageTransformerBlock:  # taken off, but others' hooks have kept this forward
            return ZImageTransformerBlock.forward(self, x, attn_mask, freqs_cis, adaln_input, *omni)
        assert attn_mask is None and adaln_input is not None, "the engine masks; blocks of the text alone are stock"
        modulation = self.adaLN_modulation(adaln_input)[:, None].chunk(4, dim=2)
        (scale, mlp_scale), (gate, mlp_gate) = (1.0 + x for x in modulation[::2]), (x.tanh() for x in modulation[1::2])
        heads = heads_of(self.attention, x)
        fill(heads, self.attention, x, freqs_cis, lambda chunk: self.attention_norm1(chunk) * scale)
        attended = heads.attend()
        out = torch.empty_like(x)
        for place in chunks_of(x):
            out[:, place] = x[:, place] + gate * self.attention_norm2(self.attention.to_out[0](attended[:, place]))
        del attended
        for place in chunks_of(x, states=STATES):
            mlp = self.ffn_norm2(self.feed_forward(self.ffn_norm1(out[:, place]) * mlp_scale))
            out[:, place] = out[:, place] + mlp_gate * mlp
        return out


STRIPED: Classes = {ZImageTransformerBlock: StripedZImageBlock}
register_blocks(STRIPED)
