"""Families of transformers, ControlNets and pipelines: a row each."""

from collections.abc import Callable, Mapping
from typing import Any

from clear_dist.engine.family import Family, PipelineAdapter, Sample
from clear_dist.engine.stock import require_not_wrapped
from clear_dist.engine.trainable import Trainable
from clear_dist.families.flux.controlled import FluxControlNetAdapter
from clear_dist.families.flux.controlnet import FluxControlNet
from clear_dist.families.flux.pipeline import FluxPipelineAdapter
from clear_dist.families.flux.sample import FluxSample
from clear_dist.families.flux.training import FluxTraining
from clear_dist.families.flux.transformer import Flux
from clear_dist.families.flux2.pipeline import Flux2PipelineAdapter
from clear_dist.families.flux2.sample import Flux2Sample
from clear_dist.families.flux2.training import Flux2Training
from clear_dist.families.flux2.transformer import Flux2
from clear_dist.families.sd3.pipeline import SD3PipelineAdapter
from clear_dist.families.sd3.sample import SD3Sample
from clear_dist.families.sd3.training import SD3Training
from clear_dist.families.sd3.transformer import SD3
from clear_dist.families.z_image.pipeline import ZImagePipelineAdapter
from clear_dist.families.z_image.sample import ZImageSample
from clear_dist.families.z_image.training import ZImageTraining
from clear_dist.families.z_image.transformer import ZImage

PIPELINES: Mapping[str, Callable[[Any], PipelineAdapter]] = {
    "FluxPipeline": FluxPipelineAdapter,
    "FluxControlNetPipeline": FluxControlNetAdapter,
    "Flux2KleinPipeline": Flux2PipelineAdapter,
    "Flux2Pipeline": Flux2PipelineAdapter,
    "StableDiffusion3Pipeline": SD3PipelineAdapter,
    "ZImagePipeline": ZImagePipelineAdapter,
}
TRANSFORMERS: dict[str, Callable[[Any], Family]] = {
    "FluxTransformer2DModel": Flux,
    "Flux2Transformer2DModel": Flux2,
    "SD3Transformer2DModel": SD3,
    "ZImageTransformer2DModel": ZImage,
}
TRAINABLE: Mapping[str, Callable[[Any], Trainable]] = {
    "FluxTransformer2DModel": FluxTraining,
    "Flux2Transformer2DModel": Flux2Training,
    "SD3Transformer2DModel": SD3Training,
    "ZImageTransformer2DModel": ZImageTraining,
}
CONTROLNETS: dict[str, Callable[[Any], Family]] = {"FluxControlNetModel": FluxControlNet}
SAMPLES: tuple[Sample, ...] = (FluxSample(), Flux2Sample(), SD3Sample(), ZImageSample())


def family_of(transformer: Any) -> Family:
    """Family of a transformer; raises ValueError where its class has none."""
    require_not_wrapped(transformer)
    name = type(transformer).__name__
    if name not in TRANSFORMERS:
        raise ValueError(f"the transformer must be one of {', '.join(TRANSFORMERS)}, got {name}")
    return TRANSFORMERS[name](transformer)


def model_family(model: Any) -> Family:
    """Family of a transformer or ControlNet of a known class."""
    return (TRANSFORMERS | CONTROLNETS)[type(model).__name__](model)


def adapter_of(pipe: Any) -> PipelineAdapter:
    """How a pipeline draws: by its transformer, or by its own class where text encoders are alone."""
    if pipe.transformer is not None:
        return family_of(pipe.transformer).adapted(pipe)
    return PIPELINES[type(pipe).__name__](pipe)


def controlnets_of(pipe: Any) -> list[Family]:
    """ControlNets of a pipeline, each once; raises ValueError where one is of another class."""
    controlnet = getattr(pipe, "controlnet", None)
    nets = [] if controlnet is None else list(getattr(controlnet, "nets", [controlnet]))
    for net in nets:
        if type(net).__name__ not in CONTROLNETS:
            known = ", ".join((*CONTROLNETS, "FluxMultiControlNetModel"))
            raise ValueError(f"the ControlNet must be one of {known}, got {type(net).__name__}")
    return [CONTROLNETS[type(net).__name__](net) for net in dict.fromkeys(nets)]
