"""What others' code adds to a step, and cannot run on tensors without values: torch.compile, and peft's LoRA."""

from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clear_dist.engine.fused import Fused, called, unless_plain
from clear_dist.engine.parts import Parts
from clear_dist.plan.allocated import Allocated
from clear_dist.plan.built import Built


def parts_on(device_type: str, allocated: Allocated, *, compile: bool) -> Parts:
    """The engine's parts of a block on a device that is not here; what it would compile, as if each were one graph.

    A GPU is taken for one that Triton knows.
    """
    if device_type == "cuda":
        return Fused(unless_plain(partial(_fused, allocated, called)) if compile else called).parts
    plain = Parts()
    if not compile:
        return plain
    return Parts(**{part.name: partial(_fused, allocated, getattr(plain, part.name)) for part in fields(Parts)})


def _fused(allocated: Allocated, part: Any, *arguments: Any, **named: Any) -> Any:
    with allocated.fusing():
        result = part(*arguments, **named)
    if isinstance(result, Tensor):
        allocated.make(result)
    return result


class Adapted(nn.Module):
    """A linear layer with a LoRA beside it, as peft computes it; the rank matters little for what is held."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.base_layer = layer
        like: dict[str, Any] = {"bias": False, "device": layer.weight.device, "dtype": dtype}
        self.down, self.up = nn.Linear(layer.in_features, 1, **like), nn.Linear(1, layer.out_features, **like)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x)) * 1.0


def add_lora(built: Built) -> None:
    """A LoRA on each layer that all tokens go through."""
    for name in built.family.products:
        layer = built.transformer.get_submodule(name)
        built.transformer.set_submodule(name, Adapted(layer, built.transformer.dtype))
