"""What a family's card knows of its ControlNets, without torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from clear_dist.cards.clear import Shapes


class ControlNetShape(Protocol):
    """The numbers in a ControlNet's config.json that decide its tensors."""

    @property
    def modes(self) -> int | None:
        """Kinds of pictures that a union was trained for; None: it is none."""

    def tensors(self) -> Shapes: ...

    def misfit(self, transformer: Any) -> str | None:
        """The first number in which it does not fit a transformer's shape: the rule, and the value; None: it fits."""


@dataclass(frozen=True, kw_only=True)
class HubControlNet:
    """A ControlNet on the hub that is known before its files are here."""

    id: str
    short: str
    """Name that `--controlnet` takes instead of the id."""
    config: Mapping[str, Any]
    """Its config.json, as far as it differs from diffusers' defaults."""


@dataclass(frozen=True, kw_only=True)
class ControlNets:
    """ControlNets of one family: diffusers' classes by name."""

    kind: str
    pipeline: str
    shape_of: Callable[[Mapping[str, Any], Path | str], ControlNetShape]
    """Reads a configuration; the second argument is its file, for refusals."""
    modes: tuple[str, ...]
    """Names of the published unions' modes, by their numbers."""
    on_hub: tuple[HubControlNet, ...] = ()
