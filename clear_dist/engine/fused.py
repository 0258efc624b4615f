"""The parts of a block by our own kernels (`kernels/elementwise.py`), a launch between two products of matrices.

What the kernels do not know - another norm, a part of it with hooks, other dtypes - takes the torch form of `parts.py`.
Layers are called as they are; plain linear ones write straight to where their output belongs.

Shapes: B batch, L tokens, C channels, H hidden channels of an MLP, N heads, D head dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from clear_dist import kernels
from clear_dist.engine import parts
from clear_dist.engine.on_cpu import ON_CPU
from clear_dist.engine.parts import Parts
from clear_dist.kernels import elementwise


def choose_parts(device_type: str, *, compile: bool) -> Parts:
    """Our kernels where they run; else torch's, compiled or as they are. Compiled beside ours: layers of others."""
    if kernels.usable(device_type):
        return Fused(unless_plain(parts.as_graph(called)) if compile else called).parts
    if compile:
        return Parts.compiled()
    return ON_CPU if device_type == "cpu" else Parts()


def called(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def unless_plain(graph: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    """Calls plain linear layers, in which nothing can be fused, as they are: `graph` is for LoRA and 8 bits."""

    def call(layer: nn.Module, x: Tensor) -> Tensor:
        if any(hasattr(each, "base_layer") or isinstance(each, nn.Linear) > is_plain(each) for each in layer.modules()):
            return graph(layer, x)
        return layer(x)

    return call


@dataclass(frozen=True)
class Fused:
    """The functions of `Parts`; linear layers and MLPs are called by `call`."""

    call: Callable[[nn.Module, Tensor], Tensor] = called

    @property
    def parts(self) -> Parts:
        return Parts(**{part.name: getattr(self, part.name) for part in fields(Parts)})

    def modulate(self, norm: Any, x_BLC: Tensor, shift_BC: Tensor, scale_BC: Tensor) -> Tensor:
        if not (is_layer_norm(norm, x_BLC) and elementwise.takes(x_BLC, shift_BC, scale_BC)):
            return parts.modulate(norm, x_BLC, shift_BC, scale_BC)
        return elementwise.modulate(x_BLC, shift_BC, scale_BC, norm.eps)

    def project(self, linear: Any, x_BLC: Tensor, out_BLND: Tensor) -> None:
        # Other dtypes: autocast, of which products that are told where to write know nothing.
        is_known = is_plain(linear) and x_BLC.dtype == linear.weight.dtype == out_BLND.dtype
        if not is_known or torch.is_grad_enabled():
            out_BLND.copy_(self.call(linear, x_BLC).unflatten(-1, out_BLND.shape[-2:]))
            return
        for x_LC, out_LND in zip(x_BLC, out_BLND, strict=True):
            product(linear, x_LC, out_LND.view(len(x_LC), linear.out_features))

    def rotate(
        self, layers: Sequence[tuple[Any, Any]], x_BLC: Tensor, cos_LD: Tensor, sin_LD: Tensor, *outs_BLND: Tensor
    ) -> None:
        turned = [(norm, out_BLND) for (_, norm), out_BLND in zip(layers, outs_BLND, strict=True)]
        is_known = all(is_rms_norm(*each) for each in turned) and len({norm.eps for norm, _ in turned}) == 1
        if not (is_known and elementwise.takes(x_BLC, cos_LD, sin_LD, *outs_BLND)):
            parts.rotate(layers, x_BLC, cos_LD, sin_LD, *outs_BLND)
            return
        heads_BLND = [self.call(linear, x_BLC).unflatten(-1, outs_BLND[0].shape[-2:]) for linear, _ in layers]
        weights_D = [norm.weight for norm, _ in turned]
        elementwise.rotate(heads_BLND, weights_D, cos_LD, sin_LD, outs_BLND, turned[0][0].eps)

    def widen(self, linear: nn.Module, activation: nn.Module, x_BLC: Tensor, out_BLH: Tensor) -> None:
        is_gelu = is_stock(activation, nn.GELU) and activation.approximate == "tanh"
        if not (is_gelu and elementwise.takes(x_BLC, out_BLH)):
            parts.widen(linear, activation, x_BLC, out_BLH)
            return
        elementwise.gelu(self.call(linear, x_BLC), out_BLH)

    def add_gated(self, linear: nn.Module, x_BLC: Tensor, y_BLH: Tensor, gate_BC: Tensor, out_BLC: Tensor) -> None:
        if not elementwise.takes(x_BLC, gate_BC, out_BLC):
            parts.add_gated(linear, x_BLC, y_BLH, gate_BC, out_BLC)
            return
        elementwise.add_gated(x_BLC, gate_BC, self.call(linear, y_BLH), out_BLC)

    def add_attention_and_mlp(
        self,
        layers: Sequence[Any],
        x_BLC: Tensor,
        attended_BLC: Tensor,
        modulation_BC: Sequence[Tensor],
        out_BLC: Tensor,
    ) -> None:
        to_out, norm, mlp = layers
        if not (is_layer_norm(norm, x_BLC) and elementwise.takes(x_BLC, *modulation_BC, out_BLC)):
            parts.add_attention_and_mlp(layers, x_BLC, attended_BLC, modulation_BC, out_BLC)
            return
        attention_gate, shift, scale, gate = modulation_BC
        attention = self.call(to_out, attended_BLC)
        normed = elementwise.add_and_modulate(x_BLC, attention_gate, attention, shift, scale, out_BLC, norm.eps)
        del attention
        elementwise.add_gated(out_BLC, gate, self.call(mlp, normed), out_BLC)


def is_stock(module: nn.Module, *kinds: type) -> bool:
    """Whether it is of these very classes, and does what they do: no hooks, no forward of its own."""
    return type(module) in kinds and not (
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    )


def is_plain(linear: nn.Module) -> bool:
    """Whether a product with its weight is all that it does; its weight may be in shards, or in 8 bits."""
    return is_stock(linear, nn.Linear) and type(linear.weight.data) is Tensor


def is_layer_norm(norm: nn.Module, x_BLC: Tensor) -> bool:
    return is_stock(norm, nn.LayerNorm) and not norm.elementwise_affine and norm.normalized_shape == x_BLC.shape[-1:]


def is_rms_norm(norm: nn.Module, x_BLND: Tensor) -> bool:
    """Whether it norms each head and scales it."""
    weight, head_dim = getattr(norm, "weight", None), x_BLND.shape[-1]
    known = is_stock(norm, nn.RMSNorm, RMSNorm) and norm.eps is not None and getattr(norm, "bias", None) is None
    return known and weight is not None and weight.shape == (head_dim,) and head_dim % 2 == 0


def product(linear: Any, x_LC: Tensor, out_LC: Tensor) -> None:
    """A plain layer's output, written to `out_LC`."""
    if linear.bias is None:
        torch.mm(x_LC, linear.weight.t(), out=out_LC)
    else:
        torch.addmm(linear.bias, x_LC, linear.weight.t(), out=out_LC)
