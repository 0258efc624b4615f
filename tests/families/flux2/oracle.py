"""CLEAR in an unmodified FLUX.2, written apart from the engine: dense masks over the whole image, nothing cut."""

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from tests.oracle import DenseClearProcessor, Rotary


class DenseParallelProcessor(DenseClearProcessor):
    """For single blocks: one product for queries, keys, values and SwiGLU's two inputs; one for both outputs."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        width = attn.heads * attn.head_dim
        query, key, value, gate, up = attn.to_qkv_mlp_proj(hidden_states).split(
            [width] * 3 + [attn.mlp_hidden_dim] * 2, dim=-1
        )
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        query, key = (
            apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (attn.norm_q(query), attn.norm_k(key))
        )
        text = query.shape[1] - len(self.seen)
        seen_by_image = torch.cat([torch.ones(len(self.seen), text, dtype=torch.bool), self.seen], dim=1)
        image = self.attend_image(query[:, text:], key, value, seen_by_image)
        attended = torch.cat([self._text_output(query[:, :text], key, value, text), image], dim=1).flatten(2)
        return attn.to_out(torch.cat([attended, torch.nn.functional.silu(gate) * up], dim=-1))


def put_oracle(
    pipe: Any, height: int, width: int, radius: int, text_parts: list[range] | None = None, **settings: Any
) -> None:
    """Give a stock pipeline's layers dense processors; arguments as DenseClearProcessor's."""
    arguments = height, width, radius, text_parts
    double, single = DenseClearProcessor(*arguments, **settings), DenseParallelProcessor(*arguments, **settings)
    pipe.transformer.set_attn_processor(
        {name: single if name.startswith("single") else double for name in pipe.transformer.attn_processors}
    )


def enlarged(pipe: Any, *, ntk_factor: float, position_scale: float) -> Rotary:
    """A rotary embedding above the native size; text positions are on the axis that is not scaled by it."""
    stock = pipe.transformer.pos_embed
    return Rotary(tuple(stock.axes_dim), theta=ntk_factor * stock.theta, position_scale=position_scale)
