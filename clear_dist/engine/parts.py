"""Parts of a block between communications, as functions of tensors and of the block's own layers.

Each can be compiled alone, which fuses all between matrix products; writing results straight to their destination then
takes no extra pass over memory. Layers are called as they are: with LoRA, quantised, in another place.

Shapes: B batch, L tokens, C channels, H hidden channels of an MLP, N heads, D head dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import ceil
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

MOST_TOKENS = 40_960
"""Largest chunk, all pictures together; cutting 8192 px on 8 ranks would lower no peak, and hide fewer messages."""
LARGEST_FLOAT16 = 65_504


def modulate(norm: nn.Module, x_BLC: Tensor, shift_BC: Tensor, scale_BC: Tensor) -> Tensor:
    """AdaLN [B, L, C]."""
    return norm(x_BLC) * (1 + scale_BC[:, None]) + shift_BC[:, None]


def project(linear: nn.Module, x_BLC: Tensor, out_BLND: Tensor) -> None:
    out_BLND.copy_(linear(x_BLC).unflatten(-1, out_BLND.shape[-2:]))


def rotate(
    layers: Sequence[tuple[nn.Module, nn.Module]], x_BLC: Tensor, cos_LD: Tensor, sin_LD: Tensor, *outs_BLND: Tensor
) -> None:
    """Queries, keys or both, rotated in float32: for each a linear layer, a norm and where it goes."""
    for (linear, norm), out_BLND in zip(layers, outs_BLND, strict=True):
        heads_BLND = norm(linear(x_BLC).unflatten(-1, out_BLND.shape[-2:]))
        out_BLND.copy_(apply_rotary_emb(heads_BLND, (cos_LD, sin_LD), sequence_dim=1))


def widen(linear: nn.Module, activation: nn.Module, x_BLC: Tensor, out_BLH: Tensor) -> None:
    out_BLH.copy_(activation(linear(x_BLC)))


def add_gated(linear: nn.Module, x_BLC: Tensor, y_BLH: Tensor, gate_BC: Tensor, out_BLC: Tensor) -> None:
    out_BLC.copy_(x_BLC + gate_BC[:, None] * linear(y_BLH))


def add_attention_and_mlp(
    layers: Sequence[nn.Module], x_BLC: Tensor, attended_BLC: Tensor, modulation_BC: Sequence[Tensor], out_BLC: Tensor
) -> None:
    """Gated attention output, then gated MLP; `modulation_BC`: the one's gate, the other's shift, scale and gate."""
    to_out, norm, mlp = layers
    attention_gate, shift, scale, gate = modulation_BC
    x_BLC = x_BLC + attention_gate[:, None] * to_out(attended_BLC)
    out_BLC.copy_(x_BLC + gate[:, None] * mlp(modulate(norm, x_BLC, shift, scale)))


@dataclass(frozen=True)
class Parts:
    """The functions above, as they are or compiled."""

    modulate: Callable[..., Tensor] = modulate
    project: Callable[..., None] = project
    rotate: Callable[..., None] = rotate
    widen: Callable[..., None] = widen
    add_gated: Callable[..., None] = add_gated
    add_attention_and_mlp: Callable[..., None] = add_attention_and_mlp

    @classmethod
    def compiled(cls, **options: Any) -> "Parts":
        """A graph of each (torch.compile's `options`) for any number of tokens, shared by all blocks."""
        plain = cls()
        return cls(**{part.name: as_graph(getattr(plain, part.name), **options) for part in fields(cls)})


def as_graph(part: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`part` compiled for any number of tokens."""
    graph = torch.compile(part, dynamic=True, **options)

    def call(*arguments: Any, **named: Any) -> Any:
        arguments, named = tree_map_only(Tensor, alone, (arguments, named))
        return graph(*arguments, **named)

    return call


def alone(x: Tensor) -> Tensor:
    """View of `x` that looks like a tensor of its own: dynamo would compile anew for each kind of view."""
    # A single picture may keep the stride of a larger tensor: it is indexed anew.
    return torch.from_dlpack(x[0][None] if len(x) == 1 else x)


def chunks_of(x_BLC: Tensor, *, states: int = 1) -> list[slice]:
    """Slices of nearly equal length, as few as MOST_TOKENS allows where `states` are alive; none without tokens."""
    batch, tokens = x_BLC.shape[:2]
    count = ceil(states * batch * tokens / MOST_TOKENS)
    return [slice(tokens * i // count, tokens * (i + 1) // count) for i in range(count)]


def joined(first_BLC: Tensor, second_BLC: Tensor) -> Tensor:
    """`torch.cat` along the tokens, without a copy where they follow each other in memory already."""
    (batch, length, channels), tokens = first_BLC.shape, first_BLC.shape[1] + second_BLC.shape[1]
    strides = (tokens * channels, channels, 1)
    matters = slice(batch == 1, None)  # a single picture's stride is arbitrary
    adjacent = (
        first_BLC.untyped_storage()._cdata == second_BLC.untyped_storage()._cdata
        and second_BLC.storage_offset() == first_BLC.storage_offset() + length * channels
        and first_BLC.stride()[matters] == second_BLC.stride()[matters] == strides[matters]
    )
    if adjacent:
        return first_BLC.as_strided((batch, tokens, channels), strides)
    return torch.cat([first_BLC, second_BLC], dim=1)


def finite(x: Tensor) -> Tensor:
    """`x`, clipped in place where it is float16, as in diffusers."""
    return x.clip_(-LARGEST_FLOAT16, LARGEST_FLOAT16) if x.dtype == torch.float16 else x
