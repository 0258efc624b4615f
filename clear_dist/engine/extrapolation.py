"""Transformers above their native size, in the upper stages of a cascade (paper, Sec. 4.3)."""

from dataclasses import dataclass
from math import isfinite, log, sqrt

POOLED_COUNT = 10
"""Factor of n where there are down-sampled keys: 10 in the official code, whatever their own factor."""


@dataclass(frozen=True, kw_only=True)
class Extrapolation:
    """A transformer above its native size, equally on all ranks; raises ValueError for values out of range."""

    native_tokens: int
    """Image tokens at the native size, such as 64 x 64."""
    ntk_factor: float = 1.0
    """Factor of the rotary embedding's base (theta); 10 in the paper."""
    least_frequency: float = 0.0
    """Least factor of each of the stock embedding's frequencies; 0: as low as the larger base makes them."""
    position_scale: float = 1.0
    """Factor of the image's position ids; native side / this side: in the native range."""
    sharpens: bool = True
    """Whether scores are scaled so that more keys keep their entropy (`attention_scale`)."""
    shifts: bool = False
    """Whether even steps have their patches half a token off, a ring of zeros around the picture (I-Max)."""

    text_block: int | None = None
    """Side in tokens of the blocks of which each has a copy of the text (I-Max); None: there is one text."""

    @property
    def grids(self) -> int:
        """Grids of patches that steps take turns on."""
        return 2 if self.shifts else 1

    def __post_init__(self) -> None:
        if self.native_tokens < 2:
            raise ValueError(f"native_tokens must be at least 2, got {self.native_tokens}; nearest: 2")
        for name in ("ntk_factor", "position_scale"):
            factor = getattr(self, name)
            if not (factor > 0 and isfinite(factor)):
                raise ValueError(f"{name} must be above 0 and finite, got {factor}; without effect: 1")


def attention_scale(
    extrapolation: Extrapolation | None,
    *,
    head_dim: int,
    text_tokens: int,
    image_tokens: int,
    copies: int = 1,
    pooled: bool = False,
) -> float | None:
    """Factor of the scores, sqrt(log_n0(n) / d), which keeps the entropy of more keys ("proportional attention").

    n counts text keys, of all `copies` of the text that are seen, and image keys of the whole grid, n0 those at the
    native size, where there is one text. None without an extrapolation that sharpens: 1 / sqrt(d).
    """
    if extrapolation is None or not extrapolation.sharpens:
        return None
    keys = (POOLED_COUNT if pooled else 1) * (text_tokens + image_tokens)
    return sqrt(log(keys, text_tokens // copies + extrapolation.native_tokens) / head_dim)
