"""How pipelines with a flow-matching schedule draw: what adapters of all families have in common.

Shapes: B pictures, C channels, H rows of the picture, R of this rank and W columns in the VAE's layout.
"""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from clear_dist.engine.family import OnStep, Others
from clear_dist.engine.inpainting import Kept
from clear_dist.engine.refiner import Below, Keep, Layout, Refiner
from clear_dist.engine.strided import fit_to_vae
from clear_dist.options import shortened
from clear_dist.stages import ImageToImage, Size, Stage, Upscaling


class FlowMatchAdapter:
    """A `PipelineAdapter` but for prompts, guidance and the layout of latents."""

    packing: int
    """Latents along the side of a token."""
    starts_from_pictures: bool = True
    stock: type
    image_to_image: type

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    @property
    def token_size(self) -> int:
        return self._pipe.vae_scale_factor * self.packing

    @property
    def native_size(self) -> int:
        return self._pipe.vae.config.sample_size

    @property
    def has_yarn(self) -> bool:
        return False

    def refining(self, stage: Stage, below: Below | None = None) -> Any:
        """Image-to-image pipeline; in upper stages with the scheduler's static shift (paper, Sec. 4.3).

        The dynamic shift grows with the size, until every step is taken in pure noise. Raises ValueError where it would
        leave a part out.
        """
        name, parts = self.image_to_image.__name__, inspect.signature(self.image_to_image).parameters
        if other := [part for part in self._pipe.components if part not in parts]:
            raise ValueError(
                f"a cascade refines with {name}, which has no {', '.join(other)}, got {type(self._pipe).__name__}; "
                f"nearest: a {self.stock.__name__} of the same parts, or cascade=False"
            )
        return self._with_parts(self.image_to_image, stage, below)

    def keeping(self, pipe: Any, stage: Stage, keep: Keep) -> Any:
        """`pipe`, or one of the same parts if it is the user's, whose steps `keep` is told of."""
        pipe = self._with_parts(type(pipe), stage, None) if pipe is self._pipe else pipe
        if not isinstance(pipe.scheduler, Refiner):
            pipe.scheduler = Refiner.like(pipe.scheduler)
        pipe.scheduler.keeping = keep, self._layout(stage)
        return pipe

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
        """Latents as from the pipeline's `output_type="latent"`."""
        given, kept = dict(self._guided(embeddings, stage)), None
        generator = partial(self._generator, stage, seed, others)
        if start is not None:
            given |= {"image": start, **self._noise(pipe, stage, start)}
            kept = None if mask is None else Kept(start, mask, generator, self.packed)
        return self._drawn(pipe, stage, generator(), on_step, given, kept)

    def packed(self, latents_BCHW: Tensor) -> Tensor:
        return latents_BCHW

    def spread(self, latents: Tensor, size: Size) -> Tensor:
        """Latents [B, C, H, W] of pictures of `size` pixels, from the pipeline's layout."""
        return latents

    def gathered(self, latents_BCHW: Tensor) -> Tensor:
        """The inverse of `spread`."""
        return self.packed(latents_BCHW)

    def for_vae(self, latents_BCRW: Tensor) -> Tensor:
        config = self._pipe.vae.config
        return latents_BCRW / config.scaling_factor + config.shift_factor

    def from_vae(self, mean_BCHW: Tensor) -> Tensor:
        config = self._pipe.vae.config
        return (mean_BCHW - config.shift_factor) * config.scaling_factor

    def _guided(self, embeddings: Mapping[str, Tensor], stage: Stage) -> Mapping[str, Any]:
        """The pipeline's arguments for embeddings and guidance."""
        raise NotImplementedError

    def _noise(self, pipe: Any, stage: Stage, start: Tensor) -> dict[str, Any]:
        """What tells an image-to-image pipeline how much noise the picture gets, and in how many steps it goes."""
        sampling = stage.sampling
        if isinstance(sampling, ImageToImage):
            return {"strength": sampling.strength, "num_inference_steps": sampling.schedule}
        return {"strength": 1.0, "sigmas": self._led(pipe, stage, start)}  # stated like this, every step counts

    def _led(self, pipe: Any, stage: Stage, target_BCHW: Tensor) -> list[float]:
        """Levels of noise of a refinement, which the enlarged picture's latents lead from here on."""
        pipe.scheduler.lead(target_BCHW, self._layout(stage))
        return pipe.scheduler.levels

    def _layout(self, stage: Stage) -> Layout:
        sizes = stage.size, (stage.height + self.token_size, stage.width + self.token_size)
        return Layout(spread=lambda latents, has_ring: self.spread(latents, sizes[has_ring]), packed=self.gathered)

    def _generator(self, stage: Stage, seed: int, others: Others) -> torch.Generator:
        """Generator as it is once it has drawn the noise of others' pictures before these."""
        generator = torch.Generator().manual_seed(seed)
        self._leave(others[0], stage, generator)
        return generator

    def _leave(self, count: int, stage: Stage, generator: torch.Generator) -> None:
        """Draw the noise of `count` pictures, for nothing."""
        sides = stage.height // self._pipe.vae_scale_factor, stage.width // self._pipe.vae_scale_factor
        for _ in range(count):
            torch.randn(self._pipe.vae.config.latent_channels, *sides, generator=generator)

    def _with_parts(self, kind: type, stage: Stage, below: Below | None, **own: Any) -> Any:
        """A pipeline of the same parts. Not `from_pipe`, which turns all parts, the given one's too, to float32."""
        pipe = self._pipe
        scheduler = pipe.scheduler
        if isinstance(stage.sampling, Upscaling):
            scheduler = Refiner.of(scheduler, stage.sampling, below)
        made = fit_to_vae(kind(**{**pipe.components, **own, "scheduler": scheduler}))
        made.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
        return made

    def _drawn(
        self,
        pipe: Any,
        stage: Stage,
        generator: torch.Generator,
        on_step: OnStep | None,
        given: Mapping[str, Any],
        kept: Kept | None = None,
    ) -> Tensor:
        """Latents after the last step; raises RuntimeError unless they are finite."""
        steps, held = stage.sampling.steps, {}

        def end_step(pipeline: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            latents = tensors["latents"]
            latents = latents if kept is None else kept.put_back(pipeline.scheduler, latents)
            others = None if on_step is None else on_step(pipeline, stage, step + 1, latents)
            held["latents"] = latents if others is None else others
            return dict(held) if held["latents"] is not tensors["latents"] else {}

        returned = pipe(
            **{"num_inference_steps": steps, **given},
            height=stage.height,
            width=stage.width,
            generator=generator,
            output_type="latent",
            callback_on_step_end=end_step,
            callback_on_step_end_tensor_inputs=["latents"],
        ).images
        latents = held.get("latents", returned)  # some pipelines return them in another layout
        if not latents.isfinite().all():
            raise RuntimeError(f"the latents are not finite after {steps} steps in {pipe.transformer.dtype}")
        return latents


def with_noise(scheduler: Any, start: Tensor, sigmas: list[float], generator: torch.Generator) -> Tensor:
    """A picture's latents with as much noise as the first step expects."""
    scheduler.set_timesteps(sigmas=sigmas, device=start.device)
    noise = randn_tensor(start.shape, generator=generator, device=start.device, dtype=start.dtype)
    return scheduler.scale_noise(start, scheduler.timesteps[:1].expand(len(start)), noise)


def cut_off(encoder: str, tokenizer: Any, ids: list[int], most: int, *, kept: int | None = None) -> list[str]:
    """A line where a prompt has more than `most` tokens, of which `kept` are seen; all by default."""
    if len(ids) <= most:
        return []
    rest = shortened(tokenizer.decode(ids[most if kept is None else kept :], skip_special_tokens=True).strip())
    return [f"longer than the {most} tokens that {encoder} takes here; cut off: {rest!r}"]


def cut_off_by_t5_and_clip(pipe: Any, t5: Any, prompt: str, max_sequence_length: int) -> list[str]:
    """`cut_off` where CLIP and T5 read a prompt; the last place goes to the token that ends it."""
    lines = []
    for name, tokenizer, most in (("CLIP", pipe.tokenizer, pipe.tokenizer_max_length), ("T5", t5, max_sequence_length)):
        ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
        lines += cut_off(name, tokenizer, ids, most, kept=most - 1)
    return lines
