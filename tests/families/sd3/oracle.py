"""SD3 with CLEAR's windows in a single process, written apart from the engine: dense masks, nothing cut."""

from typing import Any

import torch
from torch import Tensor

from tests.oracle import circle, softmax_attention


class DenseProcessor:
    """An attention processor for an unmodified SD3Transformer2DModel of one grid of tokens.

    Image tokens come first, as in diffusers. `parts`: rows of each part of Eq. 7, whose mean text queries take.
    """

    def __init__(self, height: int, width: int, radius: int, parts: list[range] | None = None) -> None:
        self.seen = circle(height, width, radius)
        self.width = width
        self.parts = parts

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        layers = attn.to_q, attn.to_k, attn.to_v
        query, key, value = projected(attn, layers, (attn.norm_q, attn.norm_k, None), hidden_states)
        if encoder_hidden_states is None:
            return attn.to_out[0](self.attend_image(query, key, value, self.seen).flatten(2))
        layers, norms = (
            (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
            (attn.norm_added_q, attn.norm_added_k, None),
        )
        added = projected(attn, layers, norms, encoder_hidden_states)
        tokens, text = query.shape[1], encoder_hidden_states.shape[1]
        key, value = torch.cat([key, added[1]], dim=1), torch.cat([value, added[2]], dim=1)
        seen = torch.cat([self.seen, torch.ones(tokens, text, dtype=torch.bool)], dim=1)
        image = attn.to_out[0](self.attend_image(query, key, value, seen).flatten(2))
        output = self._of_text(added[0], key, value, tokens).flatten(2)
        return image, output if attn.context_pre_only else attn.to_add_out(output)

    def attend_image(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        return softmax_attention(query, key, value, seen)

    def _of_text(self, query: Tensor, key: Tensor, value: Tensor, tokens: int) -> Tensor:
        if self.parts is None:
            return softmax_attention(query, key, value)
        outputs = []
        for rows in self.parts:
            keys = [*range(rows.start * self.width, rows.stop * self.width), *range(tokens, key.shape[1])]
            outputs.append(softmax_attention(query, key[:, keys], value[:, keys]))
        return torch.stack(outputs).mean(0)


def projected(attn: Any, layers: tuple[Any, ...], norms: tuple[Any, ...], x: Tensor) -> list[Tensor]:
    heads = [layer(x).unflatten(-1, (attn.heads, -1)) for layer in layers]
    return [x if norm is None else norm(x) for norm, x in zip(norms, heads, strict=True)]
