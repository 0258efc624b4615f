"""CLEAR in an unmodified FLUX.2, written apart from the engine: dense masks over the whole image, nothing cut."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from tests.oracle import DenseClearProcessor


class Parallel:
    """An oracle of attention for single blocks: one product for queries, keys, values and both of SwiGLU's inputs."""

    def __init__(self, dense: Any) -> None:
        self.dense = dense

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        sizes = [attn.heads * attn.head_dim] * 3 + [attn.mlp_hidden_dim] * 2
        query, key, value, gate, up = attn.to_qkv_mlp_proj(hidden_states).split(sizes, dim=-1)
        apart = SimpleNamespace(
            heads=attn.heads,
            norm_q=attn.norm_q,
            norm_k=attn.norm_k,
            to_q=lambda _: query,
            to_k=lambda _: key,
            to_v=lambda _: value,
        )
        attended = self.dense(apart, hidden_states, image_rotary_emb=image_rotary_emb)
        return attn.to_out(torch.cat([attended, silu(gate) * up], dim=-1))


def in_parallel(pipe: Any) -> None:
    """Wrap oracles that have been put on all layers of a stock pipeline, where its layers are fused."""
    processors = pipe.transformer.attn_processors
    pipe.transformer.set_attn_processor(
        {name: Parallel(each) if name.startswith("single") else each for name, each in processors.items()}
    )


def put_oracle(
    pipe: Any, height: int, width: int, radius: int, text_parts: list[range] | None = None, **settings: Any
) -> None:
    """Give a stock pipeline's layers dense processors; arguments as DenseClearProcessor's."""
    pipe.transformer.set_attn_processor(DenseClearProcessor(height, width, radius, text_parts, **settings))
    in_parallel(pipe)
