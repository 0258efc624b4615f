"""A family's processors and hooks on its transformer, for an engine of the test's own."""

from typing import Any

from clear_dist.engine.stock import attention_layers


def put_on(family: Any, striped: Any) -> None:
    layers = attention_layers(family.transformer)
    for name, processor in family.processors(striped).items():
        layers[name].set_processor(processor)
    family.hooks(striped)
