"""Linear layers with weights of 8 bits: half the memory.

int8: each row is rounded to whole numbers times a scale, for any device. A layer holds both as plain tensors, so that
what casts, moves, shards or adapts layers (FSDP, LoRA) needs to know nothing of it, and makes its weights anew where it
is called: with thousands of tokens that costs less than to scale what comes out, and it rounds no product.

float8: each row of the weights and each token has a scale of its own (the largest number becomes 448), and products run
at up to twice the rate. Tokens are quantised as they come, which `--compile` fuses with what is before it.

Shapes: O outputs, I inputs of a layer; L tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import ScalingType, scaled_mm


class Int8Linear(nn.Linear):
    """Takes the place of a linear layer."""

    def __init__(self, stock: nn.Linear) -> None:
        super().__init__(stock.in_features, stock.out_features, bias=stock.bias is not None, device="meta")
        weight_OI, scale_O1 = rounded(stock.weight.detach())
        self.weight, self.bias = nn.Parameter(weight_OI, requires_grad=False), stock.bias
        self.weight_scale: Tensor
        self.register_buffer("weight_scale", scale_O1)

    def forward(self, input: Tensor) -> Tensor:
        """In the dtype of `input`."""
        weight_OI = (self.weight * self.weight_scale).to(input.dtype)
        return functional.linear(input, weight_OI, self.bias)


def rounded(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of int8 from -128 to 127, and the float32 scales [O, 1] that turn them back (symmetric, weight-only)."""
    weight_OI = weight_OI.float()
    scale_O1 = (weight_OI.abs().amax(dim=1, keepdim=True) / 127.5).clamp_min(torch.finfo(torch.float32).eps)
    return (weight_OI * scale_O1.reciprocal()).round().clamp(-128, 127).to(torch.int8), scale_O1


def to_int8(transformer: Any, names: list[str]) -> None:
    """Quantises the layers of these names, in their places; what they were is not kept.

    Raises:
        ValueError: see `plain_layers`; nothing has been changed then.
    """
    for name, layer in plain_layers(transformer, names, "int8").items():
        transformer.set_submodule(name, Int8Linear(layer))


FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
SMALLEST_SCALE = 1e-12
CAPABILITY = (8, 9)


class Float8Linear(nn.Linear):
    """Takes the place of a linear layer."""

    def __init__(self, stock: nn.Linear) -> None:
        super().__init__(stock.in_features, stock.out_features, bias=stock.bias is not None, device="meta")
        weight_OI, scale_O1 = quantised(stock.weight.detach())
        # As bytes: what casts floating-point weights, or makes a LoRA of their dtype, leaves them alone.
        self.weight, self.bias = nn.Parameter(weight_OI.view(torch.uint8), requires_grad=False), stock.bias
        self.weight_scale: Tensor
        self.register_buffer("weight_scale", scale_O1)

    def forward(self, input: Tensor) -> Tensor:
        """In the dtype of `input`."""
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
    """Rows of float8, and what they are multiplied by to be what they were, float32 [rows, 1]."""
    scale = (x.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp_min(SMALLEST_SCALE)
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(FLOAT8), scale


def to_float8(transformer: Any, names: list[str]) -> None:
    """Quantises the layers of these names, in their places; what they were is not kept.

    Raises:
        ValueError: see `plain_layers`; nothing has been changed then.
    """
    for name, layer in plain_layers(transformer, names, "float8").items():
        transformer.set_submodule(name, Float8Linear(layer))


def plain_layers(transformer: Any, names: Sequence[str], setting: str) -> dict[str, nn.Linear]:
    """The layers of these names; raises ValueError where one is not `nn.Linear` itself (but has a LoRA, mostly)."""
    layers = {name: transformer.get_submodule(name) for name in names}
    for name, layer in layers.items():
        if type(layer) is not nn.Linear:
            got = type(layer).__name__
            raise ValueError(
                f"{setting} needs plain linear layers, got a {got} for {name}; load LoRA after parallelize"
            )
    return layers


def why_not_float8(device: torch.device, dtype: torch.dtype) -> str | None:
    """What speaks against float8 here; None: nothing."""
    if device.type != "cuda":
        return f"a CUDA GPU, got {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"a GPU of compute capability 8.9 or higher, got {capability[0]}.{capability[1]}"
    return None if dtype == torch.bfloat16 else f"bfloat16 for all that is not float8, got {dtype}"
