"""Linear layers with 8-bit weights: half the memory.

int8: rows are integers times a scale, on any device, in plain tensors that casts, moves, shards and adapters take as
ever. Each call makes the weights anew: with thousands of tokens that costs less than scaling the output, and it rounds
no product.

float8: each row of weights and each token has its own scale (the largest number becomes 448), and products run at up to
twice the rate. `--compile` fuses the tokens' quantisation with the operations before it.

Shapes: O outputs, I inputs of a layer; L tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import ScalingType, scaled_mm


class QuantisedLinear(nn.Linear):
    """A linear layer with 8-bit weights [O, I] and float32 scales [O, 1] of their rows."""

    weight_scale: Tensor

    def __init__(self, stock: nn.Linear, weight_OI: Tensor, scale_O1: Tensor) -> None:
        super().__init__(stock.in_features, stock.out_features, bias=stock.bias is not None, device="meta")
        self.weight, self.bias = nn.Parameter(weight_OI, requires_grad=False), stock.bias
        self.register_buffer("weight_scale", scale_O1)


class Int8Linear(QuantisedLinear):
    def __init__(self, stock: nn.Linear) -> None:
        super().__init__(stock, *rounded(stock.weight.detach()))

    def forward(self, input: Tensor) -> Tensor:
        weight_OI = (self.weight * self.weight_scale).to(input.dtype)
        return functional.linear(input, weight_OI, self.bias)


def rounded(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """int8 rows [O, I] from -128 to 127, and their float32 scales [O, 1] (symmetric, weight-only)."""
    scale_O1 = (weight_OI.abs().amax(dim=1, keepdim=True).float() / 127.5).clamp_min(torch.finfo(torch.float32).eps)
    # In place, in the float32 that the product has: a card may have no room for more.
    return (weight_OI * scale_O1.reciprocal()).round_().clamp_(-128, 127).to(torch.int8), scale_O1


def to_int8(transformer: Any, names: list[str]) -> None:
    """Quantise in place, for good; raises as `plain_layers`, before any change."""
    for name, layer in plain_layers(transformer, names, "int8").items():
        transformer.set_submodule(name, Int8Linear(layer))


FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
SMALLEST_SCALE = 1e-12
CAPABILITY = (8, 9)


class Float8Linear(QuantisedLinear):
    def __init__(self, stock: nn.Linear) -> None:
        weight_OI, scale_O1 = quantised(stock.weight.detach())
        # As bytes, which casts of floating-point weights, and a LoRA made of their dtype, leave alone.
        super().__init__(stock, weight_OI.view(torch.uint8), scale_O1)

    def forward(self, input: Tensor) -> Tensor:
        rows_LI, scale_L1 = quantised(input.flatten(0, -2))
        output_LO = scaled_mm(
            rows_LI,
            self.weight.view(FLOAT8).t(),
            scale_L1,
            ScalingType.RowWise,
            self.weight_scale.t(),
            ScalingType.RowWise,
            bias=self.bias,
            output_dtype=input.dtype,
            use_fast_accum=input.is_cuda,
        )
        return output_LO.unflatten(0, input.shape[:-1])


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """float8 rows, and the float32 scales [rows, 1] that turn them back."""
    scale = (x.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp_min(SMALLEST_SCALE)
    return (x / scale).clamp_(-LARGEST, LARGEST).to(FLOAT8), scale


def to_float8(transformer: Any, names: list[str]) -> None:
    """Like `to_int8`."""
    for name, layer in plain_layers(transformer, names, "float8").items():
        transformer.set_submodule(name, Float8Linear(layer))


def plain_layers(transformer: Any, names: Sequence[str], setting: str) -> dict[str, nn.Linear]:
    """Layers of these names; raises ValueError where one is not `nn.Linear` itself (mostly because of a LoRA)."""
    layers = {name: transformer.get_submodule(name) for name in names}
    for name, layer in layers.items():
        if type(layer) is not nn.Linear:
            got = type(layer).__name__
            raise ValueError(
                f"{setting} needs plain linear layers, got a {got} for {name}; load LoRA after parallelize"
            )
    return layers


def why_not_float8(device: torch.device, dtype: torch.dtype) -> str | None:
    """Requirement of float8 that is not met here; None: float8 works."""
    if device.type != "cuda":
        return f"a CUDA GPU, got {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"a GPU of compute capability 8.9 or higher, got {capability[0]}.{capability[1]}"
    return None if dtype == torch.bfloat16 else f"bfloat16 for all that is not float8, got {dtype}"
