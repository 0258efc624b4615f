"""Checks that a model is still as diffusers made it: on stripes, changes would be lost or bypassed."""

import re
from collections import OrderedDict
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from clear_dist.engine.family import StripeProcessor

COMPILED = "torch.compile cannot follow messages between ranks; pass parallelize(compile=True) instead"
WRAPPED = f"{COMPILED}, after pipe.transformer = pipe.transformer._orig_mod"
CACHED = "step caches must be off, except parallelize(cache=...): each rank would decide from its own stripe; "
DISABLED, LEFT_OUT = "call pipe.transformer.disable_cache()", "leave them out, and load a model anew that has one"
IN_SHARDS = "weights in shards cannot be saved: each rank has its share; call undo() first"
OTHERS_PARALLELISM = "diffusers' own enable_parallelism cannot be combined with parallelize; use one of them"
FUSED = "fused projections cannot be cut; leave out fuse_qkv_projections()"
COPIED = "a model on stripes cannot be copied or pickled: it is tied to its ranks; call undo() first"
CACHES = re.compile(r"cache|fbc|broadcast|skip")
"""Names of diffusers' hooks that leave out a layer in some steps."""


class OnStripes:
    """A model's answers, until `remove`, to what would fail later in words of others, or give wrong pictures.

    Attributes of this one instance: its class stays, by which diffusers tells the parts of pipelines.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        refused = {
            COMPILED: ("compile", "compile_repeated_blocks"),
            CACHED + LEFT_OUT: ("enable_cache",),
            OTHERS_PARALLELISM: ("enable_parallelism",),
            FUSED: ("fuse_qkv_projections",),
            COPIED: ("__deepcopy__", "__reduce_ex__"),
        }
        self._answers: dict[str, Any] = {name: partial(refuse, why) for why, names in refused.items() for name in names}
        # A call of the model finds its class's; what torch.compile compiles is this one.
        self._answers |= {
            "__call__": refuse_compiled,
            "fuse_lora": self._fuse_lora,
            "save_pretrained": self._save_pretrained,
            "state_dict": self._state_dict,
        }
        vars(model).update(self._answers)

    def remove(self) -> None:
        for name in self._answers:
            vars(self._model).pop(name, None)

    def _fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        adapted = [module for module in self._model.modules() if hasattr(module, "merged_adapters")]
        if any(len({is_shard(weight) for weight in module.parameters()}) > 1 for module in adapted):
            raise ValueError(
                "a LoRA loaded after its layers were sharded cannot be fused; undo() first, or don't fuse it"
            )
        type(self._model).fuse_lora(self._model, *args, **kwargs)

    def _save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        if any(map(is_shard, self._model.parameters())):
            raise ValueError(IN_SHARDS)
        type(self._model).save_pretrained(self._model, *args, **kwargs)

    def _state_dict(self, *args: Any, **kwargs: Any) -> Any:
        held = type(self._model).state_dict(self._model, *args, **kwargs)
        return Shares(held) if any(map(is_shard, held.values())) else held


class Shares(OrderedDict[str, Any]):
    """A state that may be looked at, as diffusers does where it loads a LoRA, and is not saved."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ValueError(IN_SHARDS)


def refuse(why: str, *_: Any, **__: Any) -> NoReturn:
    raise ValueError(why)


def is_shard(x: Any) -> bool:
    """Whether a tensor is a share of one, as FSDP leaves them."""
    return hasattr(x, "to_local")


@torch.compiler.disable(reason=COMPILED)
def refuse_compiled(*_: Any, **__: Any) -> NoReturn:
    """Raises ValueError, outside of what is compiled: what is raised in there becomes the compiler's error."""
    raise ValueError(WRAPPED)


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
                raise ValueError(f"the processor of {name} must be {stock.__name__}, got {others(module.processor)}")


def others(processor: Any) -> str:
    """Name of a processor that is not ours, and what to do."""
    name = type(processor).__name__
    if "IPAdapter" in name:
        return f"{name}; IP-Adapters cannot be combined with parallelize, pipe.unload_ip_adapter() takes them off"
    return f"{name}; processors of one's own cannot be combined with parallelize, set_attn_processor puts others back"


def require_not_wrapped(model: Any) -> None:
    """Raises ValueError for what `torch.compile(model)` returns."""
    if hasattr(model, "_orig_mod"):
        raise ValueError(WRAPPED)


def require_followed(model: Any) -> None:
    """Raises ValueError where projections are fused, steps cached, or the model or one of its blocks is compiled."""
    if any(getattr(module, "fused_projections", False) for module in model.modules()):
        kind = "controlnet" if "ControlNet" in type(model).__name__ else "transformer"
        raise ValueError(f"fused projections cannot be cut; call pipe.{kind}.unfuse_qkv_projections() first")
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()):
        raise ValueError(COMPILED)
    hooks = {
        name for module in model.modules() for name in getattr(getattr(module, "_diffusers_hook", None), "hooks", ())
    }
    if getattr(model, "is_cache_enabled", False):
        raise ValueError(CACHED + DISABLED)
    if any(map(CACHES.search, hooks)):  # of a function of diffusers, which has none to take it off
        raise ValueError(CACHED + LEFT_OUT)
    if getattr(model, "_parallel_config", None) is not None:
        raise ValueError(OTHERS_PARALLELISM)


def require_supported(transformer: Any, striped: object, layers: Collection[str], inputs: Mapping[str, Any]) -> None:
    """Raises ValueError for later changes that would give wrong pictures, or leave ranks waiting."""
    for name, layer in attention_layers(transformer).items():
        if name in layers and getattr(layer.processor, "striped", None) is not striped:
            raise ValueError(
                f"the attention processor of {name}.processor must stay clear_dist's, got {others(layer.processor)}"
            )
    require_followed(transformer)
    used = (*transformer.parameters(), *inputs.values())
    if torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in used):
        raise ValueError("stripes draw and do not train: call the model under torch.no_grad(), or undo() first")
