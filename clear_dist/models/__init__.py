"""Adaptors: what the engine must know about each transformer. A new model is one file and one row here."""

from collections.abc import Callable
from typing import Any

from clear_dist.models.flux import FluxAdaptor
from clear_dist.models.striped import Adaptor

ADAPTORS: dict[str, Callable[[Any], Adaptor]] = {"FluxTransformer2DModel": FluxAdaptor}


def adaptor_for(transformer: Any) -> Adaptor:
    """The adaptor of a transformer.

    Raises:
        ValueError: there is none for its class.
    """
    name = type(transformer).__name__
    if name not in ADAPTORS:
        raise ValueError(f"the transformer must be one of {', '.join(ADAPTORS)}, got {name}")
    return ADAPTORS[name](transformer)
