"""CLEAR's window as a dense mask, and the layers of a CLEAR checkpoint; for training and small pictures."""

from __future__ import annotations

import re

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention

IMAGE_SIDE = re.compile(
    r"(transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)|single_transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v))"
    r"\.(weight|bias)"
)


def window_mask(text: int, height: int, width: int, radius: int) -> torch.Tensor:
    """bool [text + height * width] squared: text sees everything, the image sees text and dx^2 + dy^2 < radius^2."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=1)
    squared = (places[:, None] - places[None, :]).square().sum(dim=-1)
    mask = torch.ones(text + height * width, text + height * width, dtype=torch.bool)
    mask[text:, text:] = squared < radius**2
    return mask


def image_side(transformer: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters of the image side of attention, by name: those that CLEAR trains and its checkpoints hold."""
    return {name: value for name, value in transformer.named_parameters() if IMAGE_SIDE.fullmatch(name)}


class DenseAttnProcessor:
    """FLUX's joint attention by plain matrix products: in bfloat16 on a CPU it trains twice as fast as fused."""

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        split = (-1, attn.head_dim)
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, split))
        key = attn.norm_k(attn.to_k(hidden_states).unflatten(-1, split))
        value = attn.to_v(hidden_states).unflatten(-1, split)
        if encoder_hidden_states is not None:
            text_query = attn.norm_added_q(attn.add_q_proj(encoder_hidden_states).unflatten(-1, split))
            text_key = attn.norm_added_k(attn.add_k_proj(encoder_hidden_states).unflatten(-1, split))
            text_value = attn.add_v_proj(encoder_hidden_states).unflatten(-1, split)
            query, key = torch.cat([text_query, query], dim=1), torch.cat([text_key, key], dim=1)
            value = torch.cat([text_value, value], dim=1)
        query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
        key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        joint = dense_attention(query, key, value, attention_mask).flatten(2)
        if encoder_hidden_states is None:
            return joint
        text, image = joint.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """softmax(query key^T / sqrt(D) + mask) value; all [B, S, N, D], mask bool [S, S]."""
    batch, length, _, head_dim = query.shape
    query, key, value = (part.to(value.dtype).transpose(1, 2).flatten(0, 1) for part in (query, key, value))
    bias = torch.zeros(length, length, dtype=query.dtype)
    if mask is not None:
        bias = bias.masked_fill(~mask, float("-inf"))
    scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=head_dim**-0.5)
    return torch.bmm(scores.softmax(dim=-1), value).unflatten(0, (batch, -1)).transpose(1, 2)
