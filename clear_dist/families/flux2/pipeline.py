"""FLUX.2's pipelines: diffusers' own, on a transformer that is on stripes.

Latents are packed: 2x2 of the VAE's, normed by its batch statistics, are the 128 channels of a token. diffusers has no
image-to-image for them: a refinement is a text-to-image run whose first latents are a picture with noise (SDEdit).

Shapes: B pictures, T text tokens, C channels, H rows of the picture, R of this rank and W columns in the VAE's layout.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from torch import Tensor

from clear_dist.engine.family import Encoded, OnStep, Others
from clear_dist.engine.flow_match import FlowMatchAdapter, cut_off, with_noise
from clear_dist.engine.refiner import Below
from clear_dist.families.flux2.card import PACKING
from clear_dist.stages import Size, Stage


class Flux2PipelineAdapter(FlowMatchAdapter):
    packing, starts_from_pictures = PACKING, False
    arguments: tuple[str, ...] = ("prompt_embeds", "negative_prompt_embeds")

    def __init__(self, pipe: Any, references: Sequence[Any] = ()) -> None:
        """Raises ValueError for pipelines that draw from other inputs."""
        if type(pipe) not in (Flux2Pipeline, Flux2KleinPipeline):
            raise ValueError(
                f"a Flux2Pipeline or a Flux2KleinPipeline draws pictures of any size, got {type(pipe).__name__}; "
                "nearest: one of the same parts, or a call of the pipeline itself"
            )
        super().__init__(pipe)
        self._references = references

    @torch.no_grad()
    def encode(self, texts: list[str], max_sequence_length: int) -> Encoded:
        """Three of the text encoder's layers beside each other, [B, T, C]."""
        return [self._pipe.encode_prompt(prompt=texts, max_sequence_length=max_sequence_length)[0]]

    def too_long(self, prompt: str, max_sequence_length: int) -> list[str]:
        return cut_off(self._encoder, self._tokenizer, self._tokens_of(prompt), max_sequence_length)

    def refining(self, stage: Stage, below: Below | None = None) -> Any:
        """The same pipeline with the scheduler's static shift (with the dynamic one mu is 11.5 at 4096 px)."""
        return self._with_parts(type(self._pipe), stage, below)

    def _with_parts(self, kind: type, stage: Stage, below: Below | None, **own: Any) -> Any:
        own |= {"is_distilled": self._pipe.config.is_distilled} if self._is_klein else {}
        return super()._with_parts(kind, stage, below, **own)

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
        """Packed latents [B, tokens, 128]; raises ValueError for negative prompts that the model does not take."""
        assert mask is None, "refused before"
        generator, given = self._generator(stage, seed, others), dict(self._guided(embeddings, stage))
        if start is not None:
            sigmas = self._led(pipe, stage, self._pipe._unpatchify_latents(start))
            noisy = with_noise(pipe.scheduler, start.to(embeddings["prompt_embeds"]), sigmas, generator)
            given |= {"latents": noisy, "sigmas": sigmas}
        return self._drawn(pipe, stage, generator, on_step, given)

    def referring(self, pictures: Sequence[Any]) -> "Flux2PipelineAdapter":
        return type(self)(self._pipe, pictures)

    def _guided(self, embeddings: Mapping[str, Tensor], stage: Stage) -> dict[str, Any]:
        is_guided = "negative_prompt_embeds" in embeddings
        if is_guided and not (self._is_klein and not self._pipe.config.is_distilled):
            raise ValueError("this model takes no negative prompts: its guidance is distilled; nearest: none")
        guidance = stage.sampling.guidance_scale
        if self._is_klein:
            guidance = stage.sampling.true_cfg_scale if is_guided else 1.0
        looking = {"image": list(self._references)} if self._references else {}
        return {**embeddings, **looking, "guidance_scale": guidance}

    def unpacked(self, latents: Tensor, rows: slice, size: Size) -> Tensor:
        """Rows as the decoder takes them, the batch norm undone."""
        width = size[1] // self.token_size
        mine_BCRW = latents.unflatten(1, (-1, width))[:, rows].permute(0, 3, 1, 2)
        mean, deviation = self._statistics(mine_BCRW)
        return self._pipe._unpatchify_latents(mine_BCRW * deviation + mean)

    def spread(self, latents: Tensor, size: Size) -> Tensor:
        """As the VAE has them, but normed."""
        width = size[1] // self.token_size
        return self._pipe._unpatchify_latents(latents.unflatten(1, (-1, width)).permute(0, 3, 1, 2))

    def gathered(self, latents_BCHW: Tensor) -> Tensor:
        return self._pipe._patchify_latents(latents_BCHW.contiguous()).flatten(2).transpose(1, 2)

    def for_vae(self, latents_BCRW: Tensor) -> Tensor:
        return latents_BCRW

    def from_vae(self, mean_BCHW: Tensor) -> Tensor:
        """Latents [B, 128, H / 2, W / 2], as `Flux2Pipeline` takes them."""
        latents = self._pipe._patchify_latents(mean_BCHW.contiguous())
        mean, deviation = self._statistics(latents)
        return (latents - mean) / deviation

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Means and deviations of the VAE's latents, [1, 128, 1, 1] each."""
        norm, eps = self._pipe.vae.bn, self._pipe.vae.config.batch_norm_eps
        of_channels = norm.running_mean, torch.sqrt(norm.running_var + eps)
        mean, deviation = (x.view(1, -1, 1, 1).to(like.device, like.dtype) for x in of_channels)
        return mean, deviation

    @property
    def _is_klein(self) -> bool:
        return isinstance(self._pipe, Flux2KleinPipeline)

    @property
    def _encoder(self) -> str:
        return "Qwen3" if self._is_klein else "Mistral"

    @property
    def _tokenizer(self) -> Any:
        return self._pipe.tokenizer

    def _tokens_of(self, prompt: str) -> list[int]:
        """All tokens of a prompt, in the words that the pipeline puts around it."""
        if self._is_klein:
            wrapped = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
            return self._tokenizer(wrapped, truncation=False, verbose=False).input_ids
        words = {"system": self._pipe.system_message, "user": prompt}
        said = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in words.items()]
        found = self._tokenizer.apply_chat_template([said], tokenize=True, return_dict=True)
        return list(found["input_ids"][0])
