"""The parts of a block on a CPU: the products of their linear layers, whatever module has them, by oneDNN."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

from clear_dist.engine.parts import Parts
from clear_dist.products import LinearByOneDNN


def by_onednn(part: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    with LinearByOneDNN():
        return part(*arguments, **named)


ON_CPU = Parts(**{part.name: partial(by_onednn, getattr(Parts(), part.name)) for part in fields(Parts)})
