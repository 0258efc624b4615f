"""A picture between stages."""

from dataclasses import dataclass

from torch import Tensor

from clear_dist.drawing.kept import Kept
from clear_dist.geometry import Rows
from clear_dist.stages import Size


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Pictures of one size in pixels, each rank holding some of their rows."""

    size: Size
    rows: tuple[Rows, ...]
    """Pixel rows by rank, none where a rank has nothing."""
    pixels: Tensor | None
    """My rows, bytes [B, 3, R, W]."""
    latents: Tensor | None = None
    """Whole pictures [B, tokens, C], on the ranks that drew them."""
    guidance_ranks: int = 1
    """2: each half of the ranks took a pass of guidance."""
    kept: Kept | None = None
    """What the next stage's steps go by, if they go by any."""
