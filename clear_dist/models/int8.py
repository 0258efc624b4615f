"""Linear layers with weights of 8 bits: half the memory, for GPUs that float8 is not for and for CPUs.

torchao rounds each row of the weights to whole numbers from -128 to 127, times a scale (weight-only, symmetric).
A layer holds those two as plain tensors, so that what casts, moves, shards or adapts layers (FSDP, LoRA) needs to know
nothing of it, and makes its weights anew where it is called: with thousands of tokens that costs less than to scale
what comes out, and it rounds no product.

Shapes: O outputs, I inputs of a layer.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from clear_dist.models.float8 import plain_layers


class Int8Linear(nn.Linear):
    """Takes the place of a linear layer."""

    def __init__(self, stock: nn.Linear) -> None:
        super().__init__(stock.in_features, stock.out_features, bias=stock.bias is not None, device="meta")
        weight_OI, scale_O1 = quantised(stock.weight.detach())
        self.weight, self.bias = nn.Parameter(weight_OI, requires_grad=False), stock.bias
        self.weight_scale: Tensor
        self.register_buffer("weight_scale", scale_O1)

    def forward(self, input: Tensor) -> Tensor:
        """In the dtype of `input`."""
        weight_OI = (self.weight * self.weight_scale).to(input.dtype)
        return functional.linear(input, weight_OI, self.bias)


def quantised(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of int8, and what they are multiplied by to be what they were, float32 [O, 1]."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # an extra: `pip install clear-dist[int8]`

    layer: Any = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    # In float32: torchao rounds by arithmetic of the weights' own dtype.
    layer.weight = nn.Parameter(weight_OI.float(), requires_grad=False)
    quantize_(layer, Int8WeightOnlyConfig(version=2, set_inductor_config=False))
    return layer.weight.qdata, layer.weight.scale.reshape(-1, 1)


def to_int8(transformer: Any, names: list[str]) -> None:
    """Quantises the layers of these names, in their places; what they were is not kept.

    Raises:
        ValueError: see `plain_layers`; nothing has been changed then.
    """
    for name, layer in plain_layers(transformer, names, "int8").items():
        transformer.set_submodule(name, Int8Linear(layer))
