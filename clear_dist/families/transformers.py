"""Adaptors: what the engine must know about each transformer. A new one is one file and one row here.

What the command line checks of a model before it is loaded is in `clear_dist/request/`.
"""

from collections.abc import Callable
from typing import Any

from clear_dist.engine.family import Adaptor
from clear_dist.families.flux.transformer import FluxAdaptor

ADAPTORS: dict[str, Callable[[Any], Adaptor]] = {"FluxTransformer2DModel": FluxAdaptor}


def adaptor_for(transformer: Any) -> Adaptor:
    """The adaptor of a transformer.

    Raises:
        ValueError: there is none for its class.
    """
    if hasattr(transformer, "_orig_mod"):
        raise ValueError("torch.compile cannot follow messages between ranks; pass parallelize(compile=True) instead")
    name = type(transformer).__name__
    if name not in ADAPTORS:
        raise ValueError(f"the transformer must be one of {', '.join(ADAPTORS)}, got {name}")
    return ADAPTORS[name](transformer)
