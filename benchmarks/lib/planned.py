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


def planned_bytes(model: Model, part: Part, *, device_type: str, backend: str = "auto", hoisted: bool = False) -> int:
    """Bytes that torch allocates on the rank of `part`, without CUDA's own."""
    about = {
        "module": Module(kind="diffusers.FluxTransformer2DModel", config=config_of(model)),
        "dtype": "bfloat16" if model.itemsize == 2 else "float32",
        "device": device_type,
        "ranks": part.ranks,
        "options": Options(attention_backend=backend, hoist_modulation=hoisted).settled(part.window),
    }
    step = StepQuestion(
        transport="nccl" if device_type == "cuda" else "gloo",
        height=part.grid[0],
        width=part.grid[1],
        rank=part.rank,
        images=1,
        text_tokens=model.text_tokens,
        passes=1,
        steps=1,
        down_factor=part.factor,
        has_lora=False,
        **about,
    )
    return engine().ask(WeightsQuestion(**about)).held + sum(engine().ask(step).peak.values())
