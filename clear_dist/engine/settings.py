"""How a model is put on stripes."""

from collections.abc import Callable
from dataclasses import dataclass

from clear_dist.attention import Backend
from clear_dist.comm.text_reduce import REDUCTIONS, Reduction
from clear_dist.engine.pooled_keys import Pooling
from clear_dist.options import Options


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The user's options, all chosen, and what follows from them; equal on all ranks."""

    options: Options
    choose_backend: Callable[..., Backend]
    """As `clear_dist.attention.choose_backend`, by the sizes of an image."""
    pooling: Pooling | None = None
    """Of down-sampled keys, which go with a window."""

    @property
    def reduction(self) -> Reduction:
        """How the ranks' parts of the text queries' attention become one."""
        (chosen,) = (each for each in REDUCTIONS if each.word == self.options.text_attention)
        return chosen

    @property
    def warmup_steps(self) -> int:
        """Synchronous steps before the stale schedule sets in."""
        assert self.options.warmup_steps is not None, "settled"
        return self.options.warmup_steps

    @property
    def unit(self) -> int:
        """Tokens that stripes and sides of the grid are multiples of: the factor of down-sampled keys."""
        return 1 if self.pooling is None else self.pooling.factor
