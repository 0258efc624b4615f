"""A linear layer whose weights stay in host memory and come to the device to be used; what may be around it is known.

Shapes: B batch, C channels of the input.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LORA = "peft.tuners.lora.layer.Linear"
"""It adds to what the layer below puts out, and changes neither that nor its input."""


class HoistedLinear(nn.Linear):
    """Takes the place of a linear layer, with its parameters under their names, in host memory."""

    def __init__(self, stock: nn.Linear) -> None:
        super().__init__(stock.in_features, stock.out_features, bias=stock.bias is not None, device="meta")
        self.weight, self.bias = stock.weight, stock.bias
        self.answer: Tensor | None = None
        """What the next call puts out, and no later one; None: not known."""

    def forward(self, input: Tensor) -> Tensor:
        answer, self.answer = self.answer, None
        return self.outputs([input])[0] if answer is None else answer

    def outputs(self, inputs: list[Tensor]) -> list[Tensor]:
        """For inputs [B, C] on the device; a product each, because one for all together rounds in another way."""
        parameters = {name: held.to(inputs[0].device, non_blocking=True) for name, held in self.named_parameters()}
        return [functional.linear(x, **parameters) for x in inputs]

    def to_host(self) -> None:
        """To memory that the device reads fast. Nothing happens where the parameters are there already."""
        for held in self.parameters():
            if held.device.type != "cpu":
                host = torch.empty(held.shape, dtype=held.dtype, pin_memory=held.is_cuda)
                held.data = host.copy_(held.data)


@dataclass(frozen=True)
class Place:
    """Where a linear layer is: in a norm, or in what adapters have put there around it."""

    name: str
    norm: Any
    stock: nn.Linear
    hoisted: HoistedLinear

    @classmethod
    def of(cls, name: str, norm: Any) -> "Place":
        """Nothing is changed yet.

        Raises:
            ValueError: the layer is not `nn.Linear` itself (but a quantised one, mostly), or its weights are not here.
        """
        stock = innermost(norm)
        if type(stock) is not nn.Linear or stock.weight.is_meta:
            got = "weights on no device" if type(stock) is nn.Linear else f"a {type(stock).__name__}"
            raise ValueError(f"hoist_modulation needs plain linear layers with weights, got {got} for {name}.linear")
        return cls(name, norm, stock, HoistedLinear(stock))

    def holds(self, layer: nn.Module) -> bool:
        return innermost(self.norm) is layer

    def put(self, layer: nn.Linear) -> None:
        if hasattr(self.norm.linear, "base_layer"):
            self.norm.linear.base_layer = layer
        else:
            self.norm.linear = layer

    def weights(self, device: torch.device) -> tuple[Any, ...]:
        """What tells whether the weights have changed; LoRA's additions go on as ever, on the device.

        Raises:
            ValueError: something has come that does more than add to the output.
        """
        outer = self.norm.linear
        versions = tuple(None if held.is_inference() else held._version for held in self.hoisted.parameters())
        if outer is self.hoisted:
            return versions
        kind = f"{type(outer).__module__}.{type(outer).__qualname__}"
        variants = kind == LORA and (any(outer.use_dora.values()) or getattr(outer, "lora_variant", None))
        if kind != LORA or variants or not self.holds(self.hoisted):
            got = "a variant of LoRA such as DoRA" if variants else kind
            raise ValueError(f"hoist_modulation takes LoRA and nothing else on {self.name}.linear, got {got}")
        if outer.merged and outer.disable_adapters:  # peft takes them out of the weights in the midst of the forward
            raise ValueError(f"a fused LoRA on {self.name}.linear is disabled; call pipe.unfuse_lora() instead")
        for added in () if outer.merged else (outer.lora_A, outer.lora_B):
            if any(held.device != device for held in added.parameters()):  # peft puts them where the layer's are
                added.to(device)
        return *versions, *outer.merged_adapters


def innermost(norm: Any) -> Any:
    """The linear layer itself, under adapters too."""
    return getattr(norm.linear, "base_layer", norm.linear)
