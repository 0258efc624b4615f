"""A transformer's adapters, such as LoRA, that work in some stages only."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from clear_dist.options import nearest_word


def adapted_layers(model: nn.Module) -> list[Any]:
    """Layers that peft has put adapters beside."""
    return [module for module in model.modules() if hasattr(module, "merged_adapters")]


def require_adapters(model: nn.Module, names: Sequence[str]) -> None:
    """Raises ValueError for a name that no adapter has, or one that is fused, and so in the weights of all stages."""
    known = list(getattr(model, "peft_config", ()))
    fused = {name for layer in adapted_layers(model) for name in layer.merged_adapters}
    for name in names:
        if name not in known:
            has = f"must be one of {', '.join(known)}" if known else "must be loaded first"
            nearest = nearest_word(name, known) if known else "pipe.load_lora_weights"
            raise ValueError(f"a LoRA for some stages {has}, got {name!r}; nearest: {nearest}")
        if name in fused:
            raise ValueError(f"a LoRA for some stages must not be fused, got {name!r}; call pipe.unfuse_lora() first")


@contextmanager
def resting(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Context in which these adapters add nothing; the other active ones stay so."""
    before = [(layer, list(layer.active_adapters)) for layer in (adapted_layers(model) if names else ())]
    try:
        for layer, active in before:
            layer.set_adapter([name for name in active if name not in names])
        yield
    finally:
        for layer, active in before:
            layer.set_adapter(active)
