"""Ways of refining an enlarged picture: each is a file that answers `way.Refinement`, and a row here."""

from collections.abc import Mapping
from types import MappingProxyType

from clear_dist.refining.hiflow import HiFlow
from clear_dist.refining.imax import IMax
from clear_dist.refining.sdedit import SDEdit
from clear_dist.refining.way import Guide, Refinement, Step

__all__ = ["REFINEMENTS", "Guide", "Refinement", "Step"]

REFINEMENTS: Mapping[str, Refinement] = MappingProxyType(
    {
        "sdedit": SDEdit(),
        "imax": IMax(),
        "imax:cosine-shift": IMax("cosine_shift"),
        "imax:constant": IMax("constant"),
        "hiflow": HiFlow(),
    }
)
"""By the words of `--refine`, the usual one first."""
