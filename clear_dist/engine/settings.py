"""Settings with which a model is put on stripes."""

from collections.abc import Callable
from dataclasses import dataclass

from clear_dist.attention import Backend
from clear_dist.comm.text_reduce import REDUCTIONS, Reduction
from clear_dist.engine.capture import Capture
from clear_dist.engine.pooled_keys import Pooling
from clear_dist.engine.room import SENDING_LAYERS
from clear_dist.geometry import Striping, stripe_image
from clear_dist.options import Options


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The user's options, all chosen, and their consequences; equal on all ranks."""

    options: Options
    choose_backend: Callable[..., Backend]
    pooling: Pooling | None = None
    sending_layers: int = SENDING_LAYERS
    capture: Capture | None = None
    """How a forward is captured; None: each one is launched kernel by kernel."""
    transformer: "Settings | None" = None
    """Settings of the transformer whose stripes a ControlNet shares; None: it is no ControlNet."""

    @property
    def reduction(self) -> Reduction:
        (chosen,) = (each for each in REDUCTIONS if each.word == self.options.text_attention)
        return chosen

    @property
    def warmup_steps(self) -> int:
        assert self.options.warmup_steps is not None, "settled"
        return self.options.warmup_steps

    @property
    def unit(self) -> int:
        """Factor of down-sampled keys: stripes and sides of the grid are multiples of it, in tokens."""
        return 1 if self.pooling is None else self.pooling.factor

    def stripe(self, size: tuple[int, int], ranks: int) -> Striping:
        """An image of `size` tokens on so many ranks; raises ValueError as `stripe_image`."""
        decide = self.transformer or self
        return stripe_image(size, ranks, cut=decide.options.cut, radius=decide.options.radius, unit=decide.unit)
