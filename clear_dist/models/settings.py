"""How a model is put on stripes."""

from collections.abc import Callable
from dataclasses import dataclass

from clear_dist.attention import Backend
from clear_dist.config import Schedule, TextAttention, TextTokens
from clear_dist.models.pooled_keys import Pooling


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Equal on all ranks, and checked."""

    radius: int | None
    """Of the window, in tokens; None: full attention."""
    text_attention: TextAttention
    text_tokens: TextTokens
    choose_backend: Callable[..., Backend]
    """As `clear_dist.attention.choose_backend`, by the sizes of an image."""
    schedule: Schedule
    warmup_steps: int
    hoist_modulation: bool
    compile: bool
    float8: bool
    int8: bool
    shard_weights: bool
    pooling: Pooling | None = None
    """Of down-sampled keys, which go with a window."""
    unit: int = 1
    """Tokens that stripes and sides of the grid are multiples of: the factor of down-sampled keys."""
