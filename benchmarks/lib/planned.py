"""Memory that the engine tells of a step of a transformer without text encoders and VAE."""

from functools import cache

from benchmarks.lib.counts import Model, Part
from benchmarks.lib.steps import config_of
from clear_dist.options import Options
from clear_dist.plan.engine import Engine
from clear_dist.plan.questions import Module, StepQuestion, WeightsQuestion


@cache
def engine() -> Engine:
    """It ends with this process."""
    return Engine()


def planned_bytes(model: Model, part: Part, options: Options, *, device_type: str, steps: int = 1) -> int:
    """Bytes that torch allocates on the rank of `part`, without CUDA's own.

    Args:
        steps: of a generation where halos lag; else 1.
    """
    about = {
        "module": Module(kind="diffusers.FluxTransformer2DModel", config=config_of(model)),
        "dtype": "bfloat16" if model.itemsize == 2 else "float32",
        "device": device_type,
        "ranks": part.ranks,
        "options": options.settled(part.window),
    }
    step = StepQuestion(
        transport="nccl" if device_type == "cuda" else "gloo",
        height=part.grid[0],
        width=part.grid[1],
        rank=part.rank,
        images=1,
        text_tokens=model.text_tokens,
        passes=1,
        steps=steps,
        down_factor=part.factor,
        has_lora=False,
        **about,
    )
    return engine().ask(WeightsQuestion(**about)).held + sum(engine().ask(step).peak.values())
