"""FLUX's pipelines with ControlNets: diffusers' own, their control pictures encoded before, over stripes.

Shapes: B pictures, C channels, H rows and W columns, of pixels or in the VAE's layout.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FluxControlNetPipeline, FluxMultiControlNetModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from clear_dist.engine.family import Condition, OnStep, Others
from clear_dist.engine.flow_match import with_noise
from clear_dist.engine.strided import fit_to_vae
from clear_dist.families.flux.pipeline import FluxPipelineAdapter
from clear_dist.stages import Stage

NO_MODE = -1
"""diffusers' mode of a ControlNet that has none, among several."""


class FluxControlNetAdapter(FluxPipelineAdapter):
    """How a pipeline with ControlNets draws from noise, and from a picture by the same loop.

    Not by FluxControlNetImg2ImgPipeline: it has no classifier-free guidance, and mistakes modes in batches.
    """

    stock, image_to_image, starts_from_pictures = FluxControlNetPipeline, FluxControlNetPipeline, False

    def __init__(self, pipe: Any, conditions: Sequence[Condition] = ()) -> None:
        super().__init__(pipe)
        self._conditions = conditions

    @property
    def _nets(self) -> list[Any]:
        return list(getattr(self._pipe.controlnet, "nets", [self._pipe.controlnet]))

    @property
    def _is_multi(self) -> bool:
        return isinstance(self._pipe.controlnet, FluxMultiControlNetModel)

    @property
    def reads_pixels(self) -> bool:
        return self._nets[0].input_hint_block is not None

    def check(self, modes: Sequence[int | None]) -> None:
        """Raises ValueError unless there is a mode, or none, for each picture, as the ControlNets take them."""
        nets = self._nets
        takes_several = self._is_multi and len(nets) == 1  # a union, for one picture after the other
        if len(modes) != len(nets) and not takes_several:
            raise ValueError(f"there must be a control image for each ControlNet, got {len(modes)} for {len(nets)}")
        for mode, net in zip(modes, nets * len(modes), strict=False):
            known = net.config.num_mode
            if known is None and mode is not None:
                raise ValueError(
                    f"control_mode is for unions alone, got {mode} for a ControlNet without; nearest: None"
                )
            if known is not None and (mode is None or not 0 <= mode < known):
                raise ValueError(f"control_mode must be from 0 to {known - 1} for this union, got {mode}; nearest: 0")

    def controlled(self, conditions: Sequence[Condition]) -> "FluxControlNetAdapter":
        return type(self)(self._pipe, conditions)

    def denoise(
        self,
        pipe: Any,
        embeddings: Mapping[str, Tensor],
        stage: Stage,
        *,
        seed: int,
        others: Others = (0, 0),
        start: Tensor | None = None,
        mask: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        assert mask is None, "refused before"
        generator, like = torch.Generator().manual_seed(seed), embeddings["prompt_embeds"]
        pictures = [self._sampled(each.picture, len(like), others, generator) for each in self._conditions]
        self._leave(others[0], stage, generator)
        drawing = fit_to_vae(Conditioned(**{**pipe.components, "vae": EncodedBefore(pipe.vae, pictures)}))
        drawing.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
        given = {**self._guided(embeddings, stage), **self._controls(pictures, stage)}
        if start is not None:
            sigmas = self._led(pipe, stage, start)
            noisy = with_noise(pipe.scheduler, start.to(like), sigmas, generator)
            given |= {"latents": pipe._pack_latents(noisy, *noisy.shape), "sigmas": sigmas}
        return self._drawn(drawing, stage, generator, on_step, given)

    def _sampled(self, picture_1CHW: Tensor, batch: int, others: Others, generator: torch.Generator) -> Tensor:
        """A ControlNet's picture for each of a batch: pixels, or latents drawn as the pipeline draws them."""
        before, after = others
        pictures = picture_1CHW.expand(before + batch + after, -1, -1, -1)
        sampled = pictures if self.reads_pixels else DiagonalGaussianDistribution(pictures).sample(generator)
        return sampled[before : before + batch]

    def _controls(self, pictures: Sequence[Tensor], stage: Stage) -> dict[str, Any]:
        """The pipeline's arguments: a list of each, or one where there is one ControlNet, as diffusers wants them."""
        scales, modes = [each.scale for each in self._conditions], [each.mode for each in self._conditions]
        given: dict[str, list[Any]] = {
            "control_image": list(pictures) if self.reads_pixels else [blank(each, stage) for each in pictures],
            "controlnet_conditioning_scale": scales,
            "control_guidance_start": [0.0] * len(pictures),
            "control_guidance_end": [1.0] * len(pictures),
            "control_mode": modes,
        }
        if self._is_multi:
            return {**given, "control_mode": [NO_MODE if mode is None else mode for mode in modes]}
        return {name: values[0] for name, values in given.items()}


class Conditioned(FluxControlNetPipeline):
    """The stock pipeline on pictures that are as its ControlNets read them."""

    def prepare_image(self, image: Tensor, *_: Any, **__: Any) -> Tensor:
        """Pixels [B, 3, H, W], at the size and for the batch that are drawn."""
        return image


class EncodedBefore:
    """A VAE that is given control pictures in their order, and answers with latents that it was given before."""

    def __init__(self, vae: Any, latents: Sequence[Tensor]) -> None:
        self._vae = vae
        self._latents = iter(latents)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def encode(self, pixels: Tensor) -> Any:
        return SimpleNamespace(latents=next(self._latents))


def blank(latents_BCHW: Tensor, stage: Stage) -> Tensor:
    """A picture [B, 3, H, W] without values of its own, of which the pipeline takes the size."""
    return latents_BCHW.new_zeros(()).expand(len(latents_BCHW), 3, stage.height, stage.width)
