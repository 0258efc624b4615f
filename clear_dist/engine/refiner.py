"""The scheduler of a cascade's upper stages: levels of noise and velocities as a way of refining has them."""

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from clear_dist.stages import Upscaling


class Refiner(FlowMatchEulerDiscreteScheduler):
    """Euler's steps with a static shift (paper, Sec. 4.3)."""

    levels: list[float]
    """Levels of noise before the shift."""

    @classmethod
    def of(cls, scheduler: Any, sampling: Upscaling) -> "Refiner":
        """A copy of a pipeline's scheduler for a stage that is refined like this."""
        own = scheduler.config.get("shift", 1.0)
        levels, shift = sampling.way.schedule(sampling.steps, sampling.strength, own, ())
        made: Refiner = cls.from_config(scheduler.config, use_dynamic_shifting=False, shift=shift)
        made.levels = list(levels)
        return made
