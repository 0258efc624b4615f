"""CLEAR in a single process, written apart from the engine: dense masks over the whole image, nothing cut."""

import math
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn


def circle(height: int, width: int, radius: int) -> Tensor:
    """Whether query i sees key j, [H x W, H x W] in raster order: dx^2 + dy^2 < r^2 (paper, Sec. 3.2)."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < radius**2


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
    """Softmax attention of [B, L, N, D] in float64, `seen` [L, S]."""
    scores = torch.einsum("blnd,bsnd->bnls", query.double(), key.double()) / math.sqrt(query.shape[-1])
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("bnls,bsnd->blnd", scores.softmax(-1), value.double()).to(query.dtype)


class Rotary(nn.Module):
    """FLUX's rotary embedding with another base and scaled positions; stands in for a transformer's `pos_embed`."""

    def __init__(self, axes: tuple[int, ...], *, theta: float, position_scale: float) -> None:
        super().__init__()
        self.axes = axes
        self.theta = theta
        self.position_scale = position_scale

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [L, D] float32: pair i of an axis of d dimensions turns by position * theta^(-2i / d)."""
        angles = []
        for axis, dims in enumerate(self.axes):
            frequencies = self.theta ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)
            angles.append(torch.outer(self.position_scale * ids[:, axis].double(), frequencies))
        angle = torch.cat(angles, dim=1).repeat_interleave(2, dim=1)
        return angle.cos().float(), angle.sin().float()


class DenseClearProcessor:
    """An attention processor for an unmodified FluxTransformer2DModel.

    `text_parts`: None: text queries see everything at once; else the rows of each part of Eq. 7, whose mean is taken,
    or `by_columns` the columns.
    `native_tokens`: scores are scaled by sqrt(log_n0(n) / d); n: text and image tokens, n0: those at the native size.
    """

    counted = 1
    """Times that n is taken in this scale."""

    def __init__(
        self,
        height: int,
        width: int,
        radius: int,
        text_parts: list[range] | None = None,
        *,
        native_tokens: int | None = None,
        by_columns: bool = False,
    ) -> None:
        self.seen = circle(height, width, radius)
        self.width = width
        self.text_parts = text_parts
        self.native_tokens = native_tokens
        self.by_columns = by_columns

    def tokens_of(self, part: range) -> list[int]:
        """Image tokens of a part, ascending."""
        places, lines = torch.arange(len(self.seen)).unflatten(0, (-1, self.width)), slice(part.start, part.stop)
        return (places[:, lines] if self.by_columns else places[lines]).flatten().tolist()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        query, key, value = self._project(attn, hidden_states, encoder_hidden_states)
        query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        text = query.shape[1] - len(self.seen)
        if self.native_tokens is not None:
            seen, native = self.text_counted(text)
            keys = self.counted * (seen + len(self.seen))
            query = query * math.sqrt(math.log(keys) / math.log(native + self.native_tokens))
        seen_by_image = torch.cat([self.text_seen(text), self.seen], dim=1)
        image = self.attend_image(query[:, text:], key, value, seen_by_image)
        output = torch.cat([self._text_output(query[:, :text], key, value, text), image], dim=1).flatten(2)
        if encoder_hidden_states is None:
            return output
        return attn.to_out[0](output[:, text:]), attn.to_add_out(output[:, :text])

    def text_counted(self, text: int) -> tuple[int, int]:
        """Text tokens in n, and in n0."""
        return text, text

    def text_seen(self, text: int) -> Tensor:
        """Whether image query i sees text key j, [H x W, T]."""
        return torch.ones(len(self.seen), text, dtype=torch.bool)

    def attend_image(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        """Image queries [B, L, N, D] to text and image; `seen` [L, T + H x W]."""
        return softmax_attention(query, key, value, seen)

    def _text_output(self, query: Tensor, key: Tensor, value: Tensor, text: int) -> Tensor:
        if self.text_parts is None:
            return softmax_attention(query, key, value)
        outputs = []
        for part in self.text_parts:
            tokens = [*range(text), *(text + token for token in self.tokens_of(part))]
            outputs.append(softmax_attention(query, key[:, tokens], value[:, tokens]))
        return torch.stack(outputs).mean(0)

    def _project(self, attn: Any, image: Tensor, text: Tensor | None) -> list[Tensor]:
        projected = [attn.to_q(image), attn.to_k(image), attn.to_v(image)]
        projected = [x.unflatten(-1, (attn.heads, -1)) for x in projected]
        projected[:2] = [attn.norm_q(projected[0]), attn.norm_k(projected[1])]
        if text is not None:
            added = [attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)]
            added = [x.unflatten(-1, (attn.heads, -1)) for x in added]
            added[:2] = [attn.norm_added_q(added[0]), attn.norm_added_k(added[1])]
            projected = [torch.cat(pair, dim=1) for pair in zip(added, projected, strict=True)]
        return projected
