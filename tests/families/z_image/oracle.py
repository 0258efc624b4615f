"""CLEAR on an unmodified Z-Image in a single process: the dense processors of tests/oracle.py, text put first."""

from typing import Any

import torch
from torch import Tensor

from tests.oracle import DenseClearProcessor
from tests.pooled_oracle import LatePooled, Pooled
from tests.stale_oracle import StaleProcessor


class OfZImage:
    """Mixin: diffusers' sequence is the image, its padding and the caption; pictures of a batch may differ in length."""

    seen: Tensor

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        output = torch.zeros_like(hidden_states)
        image, lengths = len(self.seen), [hidden_states.shape[1]] * len(hidden_states)
        if attention_mask is not None:
            lengths = attention_mask.flatten(1).sum(1).tolist()
        for place, length in enumerate(lengths):
            order = [*range(image, length), *range(image)]
            self.turns = freqs_cis[place : place + 1, order]
            none = torch.ones(length, 16), torch.zeros(length, 16)
            output[place, order] = super().__call__(attn, hidden_states[place : place + 1, order], None, None, none)[0]
        return attn.to_out[0](output)

    def _project(self, attn: Any, image: Tensor, text: Tensor | None) -> list[Tensor]:
        query, key, value = (
            layer(image).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        return [self._turned(attn.norm_q(query)), self._turned(attn.norm_k(key)), value]

    def _turned(self, x: Tensor) -> Tensor:
        """Neighbouring channels are a complex number, which is multiplied by its position's."""
        numbers = torch.complex(x[..., ::2].double(), x[..., 1::2].double()) * self.turns[:, :, None]
        return torch.stack([numbers.real, numbers.imag], dim=-1).flatten(-2).to(x.dtype)


class Dense(OfZImage, DenseClearProcessor):
    pass


class Stale(OfZImage, StaleProcessor):
    pass


class DensePooled(OfZImage, Pooled):
    pass


class StalePooled(OfZImage, LatePooled):
    pass


def layers_of(transformer: Any) -> dict[str, Any]:
    """Attention layers that see the image, by name, in the order of calls."""
    return {
        f"{kind}.{index}.attention": block.attention
        for kind in ("noise_refiner", "layers")
        for index, block in enumerate(getattr(transformer, kind))
    }


def put(pipe: Any, kind: type, *arguments: Any, **named: Any) -> None:
    """A processor of `kind` on each of these layers."""
    for layer in layers_of(pipe.transformer).values():
        layer.set_processor(kind(*arguments, **named))
