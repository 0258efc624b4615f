"""What `clear-dist plan` is asked for."""

from dataclasses import dataclass

from clear_dist.config import GenerateConfig


@dataclass(frozen=True, kw_only=True)
class PlanConfig(GenerateConfig):
    """One `clear-dist plan`: a `generate` on GPUs that need not be here."""

    gpu: str = "auto"
    """A row of `planning.GPUS`, `cpu`, or `auto`: those of this machine."""
    link: str = "auto"
    """A row of `planning.LINKS`, or `auto`: what the kind of GPU usually has."""
    sweep: bool = False
    json: bool = False
