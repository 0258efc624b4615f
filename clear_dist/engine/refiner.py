"""The scheduler of a cascade's upper stages: levels of noise and velocities as a way of refining has them.

Shapes: B pictures, C channels, H rows and W columns of latents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor
from torch.nn.functional import pad

from clear_dist.refining import Guide, Refinement, Step
from clear_dist.stages import Size, Upscaling


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Latents of a pipeline, of one size."""

    spread: Callable[[Tensor, bool], Tensor]
    """To [B, C, H, W], told whether they have a ring, one latent wide, around."""
    packed: Callable[[Tensor], Tensor]
    """Back."""


Keep = Callable[[int, Tensor, Tensor], None]
"""Is told a step's index, its level of noise and the clean latents [B, C, H, W] that it goes towards, float32."""


class Below(Protocol):
    """Steps of the stage below that a stage goes by."""

    sigmas: Sequence[float]
    level: int
    """Which refinement goes by them, from 1."""

    def expected(self, index: int, size: Size) -> Tensor:
        """Clean latents [B, C, *size] that step `index` of these expected, enlarged."""


@dataclass(kw_only=True)
class Leading:
    """A way of refining at work on one stage."""

    way: Refinement
    layout: Layout
    target: Tensor
    below: Below | None
    steps: int
    before: Any = field(default=None, init=False)
    """What the way has told the next step."""

    def velocity(self, index: int, sigma: Tensor, velocity: Tensor, latents: Tensor) -> Tensor:
        """Velocity that step `index` goes by, float32, in the pipeline's layout; without the ring that it may have."""
        has_ring = velocity.shape != latents.shape
        spread = self.layout.spread(velocity, has_ring).float()
        latents_BCHW, target = self.layout.spread(latents, False).float(), self.target.float()
        guide: dict[str, Any] = {}
        if self.below is not None and self.way.keeps:
            size = latents_BCHW.shape[2], latents_BCHW.shape[3]
            guide = {"expected": self.below.expected(index, size), "level": self.below.level}
        if has_ring:
            latents_BCHW, target = (pad(x, (1, 1, 1, 1)) for x in (latents_BCHW, target))
        step = Step(index=index, count=self.steps, sigma=sigma, latents=latents_BCHW)
        led, self.before = self.way.velocity(spread, step, Guide(target=target, **guide), self.before)
        return self.layout.packed(led[..., 1:-1, 1:-1] if has_ring else led)


class Refiner(FlowMatchEulerDiscreteScheduler):
    """Euler's steps with a static shift (paper, Sec. 4.3)."""

    sampling: Upscaling
    levels: list[float]
    """Levels of noise before the shift."""
    below: Below | None = None
    leading: Leading | None = None
    """None: steps go by the model's velocity."""
    keeping: tuple[Keep, Layout] | None = None

    @classmethod
    def of(cls, scheduler: Any, sampling: Upscaling, below: Below | None = None) -> "Refiner":
        """A copy of a pipeline's scheduler for a stage that is refined like this."""
        own, lower = scheduler.config.get("shift", 1.0), () if below is None else below.sigmas
        levels, shift = sampling.way.schedule(sampling.steps, sampling.strength, own, lower)
        made: Refiner = cls.from_config(scheduler.config, use_dynamic_shifting=False, shift=shift)
        made.sampling, made.levels, made.below = sampling, list(levels), below
        return made

    @classmethod
    def like(cls, scheduler: Any) -> "Refiner":
        """A copy of a pipeline's scheduler whose steps can be kept; raises ValueError for one that isn't Euler's."""
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            nearest = FlowMatchEulerDiscreteScheduler.__name__
            raise ValueError(f"steps are kept of Euler's scheduler, got {type(scheduler).__name__}; nearest: {nearest}")
        made: Refiner = cls.from_config(scheduler.config)
        return made

    def lead(self, target: Tensor, layout: Layout) -> None:
        """Lead the steps to come by the enlarged picture's latents [B or 1, C, H, W], if the way does."""
        led: dict[str, Any] = {"target": target, "layout": layout, "below": self.below, "steps": len(self.levels)}
        self.leading = Leading(way=self.sampling.way, **led) if self.sampling.way.guides else None

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **how: Any) -> Any:
        if self.leading is None and self.keeping is None:
            return super().step(model_output, timestep, sample, return_dict=return_dict, **how)
        if self.step_index is None:
            self._init_step_index(timestep)
        index, sigma = self.step_index - (self.begin_index or 0), self.sigmas[self.step_index]
        velocity = model_output
        if self.leading is not None:
            velocity = self.leading.velocity(index, sigma, model_output, sample)
        if self.keeping is not None:
            keep, layout = self.keeping
            keep(index, sigma, layout.spread(sample.float() - sigma * velocity.float(), False))
        moved = super().step(velocity, timestep, sample, return_dict=False, **how)[0].to(sample.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=moved) if return_dict else (moved,)
