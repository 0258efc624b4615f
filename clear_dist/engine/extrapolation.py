"""A transformer above its native size, in the upper stages of a cascade (paper, Sec. 4.3)."""

from dataclasses import dataclass
from math import isfinite, log, sqrt

POOLED_COUNT = 10
"""What n counts for where there are down-sampled keys: the official code takes 10 n, whatever their factor."""


@dataclass(frozen=True, kw_only=True)
class Extrapolation:
    """How a transformer runs above its native size; equal on all ranks.

    Raises:
        ValueError: fewer than 2 native tokens, or a factor that is not above 0 and finite.
    """

    native_tokens: int
    """Image tokens at the native size: 64 x 64 for FLUX."""
    ntk_factor: float = 1.0
    """Of the base (theta) of the rotary embedding; the paper takes 10."""
    position_scale: float = 1.0
    """Of the image's position ids: native side / this side interpolates them in the native range."""

    def __post_init__(self) -> None:
        if self.native_tokens < 2:
            raise ValueError(f"native_tokens must be at least 2, got {self.native_tokens}; nearest: 2")
        for name in ("ntk_factor", "position_scale"):
            factor = getattr(self, name)
            if not (factor > 0 and isfinite(factor)):
                raise ValueError(f"{name} must be above 0 and finite, got {factor}; without effect: 1")


def attention_scale(
    extrapolation: Extrapolation | None, *, head_dim: int, text_tokens: int, image_tokens: int, pooled: bool = False
) -> float | None:
    """Factor of the scores, sqrt(log_n0(n) / d): "proportional attention", which keeps the entropy of more keys.

    n is the number of all text and image keys, whatever the window and however many ranks hold them; n0 is that
    number at the native size.

    Args:
        text_tokens: the same at both sizes.
        image_tokens: of the whole grid.
        pooled: whether there are down-sampled keys as well.

    Returns:
        None without an extrapolation: attention's own 1 / sqrt(d).
    """
    if extrapolation is None:
        return None
    keys = (POOLED_COUNT if pooled else 1) * (text_tokens + image_tokens)
    return sqrt(log(keys, text_tokens + extrapolation.native_tokens) / head_dim)
