"""FLUX.2's single blocks: queries, keys, values and the MLP's input come of one product of matrices.

Where the layer is plain, each is a product with its own rows of the weight: keys and values leave before queries and
MLP are there, and many tokens' MLP can wait. Other layers (LoRA, 8 bits) are called as they are, and their output cut.

Shapes: B batch, L tokens of this rank, C channels, H hidden channels of the MLP, N heads, D head dim.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from clear_dist.engine.family import Stripes
from clear_dist.engine.fused import is_plain
from clear_dist.engine.heads import Heads
from clear_dist.engine.parts import chunks_of
from clear_dist.families.flux.attention import Projections, Rotary, fill, heads_of

Pieces = tuple[nn.Module, nn.Module, nn.Module, nn.Module]
"""To queries, keys, values and the MLP's input."""


class Flux2ParallelStripeProcessor:
    """Recipe of `blocks.py` for single blocks whose forward others have replaced: mostly hooks that bring weights."""

    def __init__(self, striped: Stripes, layer: int) -> None:
        self.striped = striped
        self.layer = layer

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Tensor:
        """Text and image joined, [B, L, C]; masks raise ValueError."""
        assert image_rotary_emb is not None, "FLUX.2 rotates in every layer"
        heads = heads_of(attn, hidden_states, hidden_states.shape[1], attention_mask)
        both = room_beside(attn, hidden_states)
        fill_beside(heads, attn, image_rotary_emb, hidden_states, lambda x: x, both)
        heads.attend(both[..., : attn.inner_dim])
        return attn.to_out(both)


class Columns(nn.Module):
    """Outputs of a product that has been computed already."""

    def __init__(self, columns: slice) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.columns]


def columns_of(attn: Any) -> tuple[slice, slice, slice, slice]:
    """Outputs of `to_qkv_mlp_proj` that are queries, keys, values and the MLP's input."""
    width, end = attn.inner_dim, 3 * attn.inner_dim + attn.mlp_hidden_dim * attn.mlp_mult_factor
    return slice(0, width), slice(width, 2 * width), slice(2 * width, 3 * width), slice(3 * width, end)


def pieces_of(attn: Any) -> Pieces | None:
    """Layers of their own, which share the whole one's memory; None where it is not plain."""
    whole = attn.to_qkv_mlp_proj
    if not is_plain(whole) or whole.bias is not None:
        return None
    to_q, to_k, to_v, to_mlp = (_rows(whole.weight, rows) for rows in columns_of(attn))
    return to_q, to_k, to_v, to_mlp


def _rows(weight_OI: Tensor, rows: slice) -> nn.Linear:
    layer = nn.Linear.__new__(nn.Linear)  # once a block and forward: its own constructor would draw a weight
    nn.Module.__init__(layer)
    layer.out_features, layer.in_features = rows.stop - rows.start, weight_OI.shape[1]
    layer.weight = nn.Parameter(weight_OI[rows], requires_grad=False)
    layer.register_parameter("bias", None)
    return layer


def room_beside(attn: Any, x_BLC: Tensor) -> Tensor:
    """Input of the output projection, [B, L, C + H]: room for the attention's output, then for the MLP's."""
    return x_BLC.new_empty(*x_BLC.shape[:2], attn.inner_dim + attn.mlp_hidden_dim)


def fill_beside(
    heads: Heads, attn: Any, rotary: Rotary, x_BLC: Tensor, modulated: Callable[[Tensor], Tensor], both_BLH: Tensor
) -> None:
    """Queries, keys, values and the MLP's output of all my tokens by the layer as it is; the MLP's in `both_BLH`."""
    to_q, to_k, to_v, to_mlp = map(Columns, columns_of(attn))
    projections: Projections = (to_q, to_k, to_v, attn.norm_q, attn.norm_k)
    places = iter(chunks_of(x_BLC))

    def projected(chunk_BLC: Tensor) -> Tensor:
        whole = attn.to_qkv_mlp_proj(modulated(chunk_BLC))
        heads.striped.parts.widen(to_mlp, attn.mlp_act_fn, whole, both_BLH[:, next(places), attn.inner_dim :])
        return whole

    fill(heads, projections, rotary, x_BLC, projected)
    heads.start_text()
