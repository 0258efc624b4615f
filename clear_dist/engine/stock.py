"""Checks that a model is still as diffusers made it: on stripes, changes would be lost or bypassed."""

from collections.abc import Collection
from typing import Any

from torch import nn

from clear_dist.engine.family import StripeProcessor


def attention_layers(model: nn.Module) -> dict[str, Any]:
    """Modules with an attention processor, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "get_processor")}


def require_stock(*models: Any) -> None:
    """Raises ValueError where a model is on stripes, compiled or fused already, or a processor is not stock."""
    for model in models:
        if any(isinstance(layer.processor, StripeProcessor) for layer in attention_layers(model).values()):
            raise ValueError("this pipeline is parallelized already; undo() the former first")
        require_followed(model)
        for name, module in model.named_modules():
            stock = getattr(module, "_default_processor_cls", None)
            if stock is not None and type(module.processor) is not stock:
                raise ValueError(
                    f"the processor of {name} must be {stock.__name__}, got {type(module.processor).__name__}; "
                    "IP-Adapters (pipe.unload_ip_adapter() takes them off) and others cannot be parallelized"
                )


def require_followed(model: Any) -> None:
    """Raises ValueError where projections are fused, or the model or one of its blocks is compiled in place."""
    if any(getattr(module, "fused_projections", False) for module in model.modules()):
        kind = "controlnet" if "ControlNet" in type(model).__name__ else "transformer"
        raise ValueError(f"fused projections cannot be cut; call pipe.{kind}.unfuse_qkv_projections() first")
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()):
        raise ValueError("torch.compile cannot follow messages between ranks; pass parallelize(compile=True) instead")


def require_supported(transformer: Any, striped: object, layers: Collection[str]) -> None:
    """Raises ValueError for later changes that would give wrong pictures, or leave ranks waiting."""
    for name, layer in attention_layers(transformer).items():
        if name in layers and getattr(layer.processor, "striped", None) is not striped:
            raise ValueError(
                f"the attention processor of {name}.processor must stay clear_dist's, "
                f"got {type(layer.processor).__name__}; "
                "IP-Adapters and other processors cannot be combined with parallelize"
            )
    require_followed(transformer)
    if getattr(transformer, "is_cache_enabled", False):
        raise ValueError(
            "step caches must be off: each rank would decide from its own stripe whether to skip a step; "
            "call pipe.transformer.disable_cache()"
        )
    if getattr(transformer, "_parallel_config", None) is not None:
        raise ValueError("diffusers' own enable_parallelism cannot be combined with parallelize; use one of them")
