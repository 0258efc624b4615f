"""Modules whose class is changed, and changed back: layers, names and hooks stay, as does the object, as in FSDP."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import nn

Classes = Mapping[type, type]
"""Our class for each of diffusers'."""


@dataclass(frozen=True)
class Reclassed:
    """A module of the class that `classes` has for its own, if any; `remove` changes it back."""

    module: nn.Module
    classes: Classes

    @classmethod
    def of(cls, module: nn.Module, classes: Classes) -> "Reclassed":
        module.__class__ = classes.get(type(module), type(module))
        return cls(module, classes)

    def remove(self) -> None:
        stock = {ours: theirs for theirs, ours in self.classes.items()}
        self.module.__class__ = stock.get(type(self.module), type(self.module))


def register_blocks(classes: Classes) -> None:
    """Make classes of blocks known to diffusers' step caches, which refuse those that they do not know."""
    for stock, ours in classes.items():
        TransformerBlockRegistry.register(ours, replace(TransformerBlockRegistry.get(stock)))
