"""What must still be as diffusers made it: else it would be lost on stripes, or computed past."""

from typing import Any


def require_stock(*models: Any) -> None:
    """Whether a transformer and its ControlNets can be put on stripes.

    Raises:
        ValueError: one is on stripes or compiled already, its projections are fused, or an attention processor is
            another.
    """
    for model in models:
        if any(hasattr(processor, "striped") for processor in model.attn_processors.values()):
            raise ValueError("this pipeline is parallelized already; undo() the former first")
        require_unfused(model)
        require_uncompiled(model)
        for name, module in model.named_modules():
            stock = getattr(module, "_default_processor_cls", None)
            if stock is not None and type(module.processor) is not stock:
                raise ValueError(
                    f"the processor of {name} must be {stock.__name__}, got {type(module.processor).__name__}; "
                    "IP-Adapters (pipe.unload_ip_adapter() takes them off) and others cannot be parallelized"
                )


def require_unfused(model: Any) -> None:
    """Raises ValueError where queries, keys and values are projected together."""
    if any(getattr(module, "fused_projections", False) for module in model.modules()):
        kind = "controlnet" if "ControlNet" in type(model).__name__ else "transformer"
        raise ValueError(f"fused projections cannot be cut; call pipe.{kind}.unfuse_qkv_projections() first")


def require_uncompiled(model: Any) -> None:
    """Raises ValueError where the model, or a block of it, is compiled in its place."""
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()):
        raise ValueError("torch.compile cannot follow messages between ranks; pass parallelize(compile=True) instead")
