"""Which family a transformer, a ControlNet or a pipeline belongs to: a row each."""

from collections.abc import Callable, Mapping
from typing import Any

from clear_dist.engine.family import Family, PipelineAdapter, Sample
from clear_dist.families.flux.controlnet import FluxControlNet
from clear_dist.families.flux.pipeline import FluxPipelineAdapter
from clear_dist.families.flux.sample import FluxSample
from clear_dist.families.flux.transformer import Flux

PIPELINES: Mapping[str, Callable[[Any], PipelineAdapter]] = {"FluxPipeline": FluxPipelineAdapter}
TRANSFORMERS: Mapping[str, Callable[[Any], Family]] = {"FluxTransformer2DModel": Flux}
CONTROLNETS: Mapping[str, Callable[[Any], Family]] = {"FluxControlNetModel": FluxControlNet}
SAMPLES: tuple[Sample, ...] = (FluxSample(),)
SEVERAL_CONTROLNETS = ("FluxMultiControlNetModel",)


def family_of(transformer: Any) -> Family:
    """The family of a transformer.

    Raises:
        ValueError: there is none for its class.
    """
    if hasattr(transformer, "_orig_mod"):
        raise ValueError("torch.compile cannot follow messages between ranks; pass parallelize(compile=True) instead")
    name = type(transformer).__name__
    if name not in TRANSFORMERS:
        raise ValueError(f"the transformer must be one of {', '.join(TRANSFORMERS)}, got {name}")
    return TRANSFORMERS[name](transformer)


def adapter_of(pipe: Any) -> PipelineAdapter:
    """How a pipeline draws, with a transformer or without."""
    kinds = [kind.__name__ for kind in type(pipe).__mro__]
    return next(PIPELINES[name] for name in kinds if name in PIPELINES)(pipe)


def controlnets_of(pipe: Any) -> list[Family]:
    """The ControlNets of a pipeline, each once; none where it has none.

    Raises:
        ValueError: one of them is of another class.
    """
    controlnet = getattr(pipe, "controlnet", None)
    nets = [] if controlnet is None else list(getattr(controlnet, "nets", [controlnet]))
    for net in nets:
        if type(net).__name__ not in CONTROLNETS:
            known = ", ".join((*CONTROLNETS, *SEVERAL_CONTROLNETS))
            raise ValueError(f"the ControlNet must be one of {known}, got {type(net).__name__}")
    return [CONTROLNETS[type(net).__name__](net) for net in dict.fromkeys(nets)]
