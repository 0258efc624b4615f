"""Ways of refining by an unmodified diffusers pipeline in a single process, written apart from the engine."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from PIL import Image
from torch import Tensor

from clear_dist.stages import Size
from tests.oracle import Rotary
from tests.refining.copies import CopiesProcessor, PooledCopies, copied, counts_of

FULL = 10**6
"""Radius of a circle that holds everything."""
NATIVE, TEXT = 64, 8
"""Native size of the tiny pipeline in pixels, and text tokens."""
SIDE = NATIVE // 16
"""Tokens along the side of a block that has a copy of the text."""
SCALE = 3.0


@dataclass
class Reference:
    """A tiny pipeline, whose transformer is called at any size, and in an upper stage as Sec. 4.3 of the paper has it."""

    pipe: FluxPipeline
    prompt: str
    radius: int = FULL
    theta: float = 10_000.0
    """Base of the rotary embedding in upper stages."""
    clips: bool = False
    negative: str | None = None
    """Negative prompt, for classifier-free guidance with `SCALE`; None: there is none."""
    copies: bool = False
    """Whether upper stages have copies of the text."""
    pooling: dict[str, Tensor] | None = None
    """Weights of down-sampled keys by their names in a checkpoint."""

    def __post_init__(self) -> None:
        prompts = (self.prompt,) if self.negative is None else (self.prompt, self.negative)
        self.texts = [self.pipe.encode_prompt(prompt=x, prompt_2=None, max_sequence_length=TEXT) for x in prompts]

    def velocity(self, latents: Tensor, sigma: float, guidance: float, *, tokens: int | None = None) -> Tensor:
        """The guided velocity [B, C, H, W] for latents of even sides; `tokens` of an upper stage's picture."""
        found = [self._velocity(text, latents, sigma, guidance, tokens) for text in self.texts]
        return found[0] if len(found) == 1 else found[1] + SCALE * (found[0] - found[1])

    def _velocity(self, text: Any, latents: Tensor, sigma: float, guidance: float, tokens: int | None) -> Tensor:
        height, width = (side // 2 for side in latents.shape[-2:])
        transformer, (prompt_embeds, pooled, text_ids) = self.pipe.transformer, text
        native = None if tokens is None else (NATIVE // 16) ** 2
        if tokens is not None and self.copies:
            prompt_embeds, text_ids = copied(prompt_embeds, text_ids, counts_of(height, width, SIDE), SIDE)
        transformer.set_attn_processor(
            {name: self._processor(name, height, width, native) for name in transformer.attn_processors}
        )
        axes = transformer.config.axes_dims_rope
        transformer.pos_embed = plain(axes, 10_000.0) if tokens is None else self.rotary(axes, tokens)
        ids = torch.stack(torch.meshgrid(*map(torch.arange, (1, height, width)), indexing="ij"), -1)
        found = transformer(
            hidden_states=self.pipe._pack_latents(latents, *latents.shape),
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled,
            timestep=torch.tensor([sigma]),
            guidance=torch.tensor([guidance]),
            img_ids=ids.flatten(0, 2),
            txt_ids=text_ids,
        ).sample
        return self.pipe._unpack_latents(found, 16 * height, 16 * width, 8)

    def _processor(self, layer: str, height: int, width: int, native: int | None) -> Any:
        image, how = (height, width, self.radius), {"native_tokens": native}
        side = SIDE if native is not None and self.copies else max(height, width)
        copies: dict[str, Any] = {"side": side, "sees_all": self.radius == FULL}
        if self.pooling is None:
            return CopiesProcessor(*image, **copies, **how)
        found = PooledCopies(*image, **copies, **how)
        found.height, found.weight = height, self.pooling[f"{layer}.spatial_weight"]
        return found

    def rotary(self, axes: tuple[int, ...], tokens: int) -> Rotary:
        """Rotary embedding of an upper stage; `tokens` of the picture, the ring of a shifted step left out."""
        least = math.sqrt((NATIVE // 16) ** 2 / tokens) if self.clips else 0.0
        return Clipped(axes, theta=self.theta, least=least)

    def encoded(self, picture: Image.Image, size: Size) -> Tensor:
        """Latents of a picture enlarged in 8 bits."""
        large = self.pipe.image_processor.preprocess(picture.resize(size[::-1], Image.Resampling.BICUBIC), *size)
        config = self.pipe.vae.config
        return (self.pipe.vae.encode(large).latent_dist.mode() - config.shift_factor) * config.scaling_factor


class Clipped(Rotary):
    """Another base, of whose frequencies none is below `least` times the stock base's."""

    def __init__(self, axes: tuple[int, ...], *, theta: float, least: float) -> None:
        super().__init__(axes, theta=theta, position_scale=1.0)
        self.least = least

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = []
        for axis, dims in enumerate(self.axes):
            for pair in range(dims // 2):
                low, stock = self.theta ** (-2 * pair / dims), 10_000.0 ** (-2 * pair / dims)
                angles += [ids[:, axis].double() * max(low, self.least * stock)] * 2
        return torch.stack(angles, 1).cos().float(), torch.stack(angles, 1).sin().float()


def plain(axes: tuple[int, ...], theta: float) -> Rotary:
    return Rotary(axes, theta=theta, position_scale=1.0)


def shifted_levels(levels: Sequence[float], shift: float) -> list[float]:
    return [*(shift * level / (1 + (shift - 1) * level) for level in levels), 0.0]


def noise(seed: int, size: Size) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 16, size[0] // 8, size[1] // 8, generator=generator)


def haar(latents: Tensor) -> Tensor:
    """What is left without the high bands of the first level: each 2 x 2 have their mean."""
    return F.interpolate(F.avg_pool2d(latents, 2), scale_factor=2, mode="nearest")


@torch.no_grad()
def imax(
    reference: Reference, target: Tensor, x: Tensor, *, steps: int, guidance: float, kind: str, shifts: bool = True
) -> Tensor:
    """I-Max's upper stage as its official code draws it, from noise `x` towards `target`."""
    tokens = target.shape[2] * target.shape[3] // 4
    levels = shifted_levels(np.linspace(1.0, 1 / steps, steps).tolist(), 6.0)
    for index in range(steps):
        if shifts and index % 2 == 0:
            x, target = F.pad(x, (1, 1, 1, 1)), F.pad(target, (1, 1, 1, 1))
        elif shifts:
            x, target = x[..., 1:-1, 1:-1], target[..., 1:-1, 1:-1]
        sigma, following = levels[index : index + 2]
        v = reference.velocity(x, sigma, guidance, tokens=tokens)
        v_guide = -(target - x) / (sigma + 1e-6)
        weight = 0.5 * (1 + math.cos(math.pi * index / steps))
        low = haar(v_guide) - haar(v)
        if kind == "cosine_decay":
            v = v + weight * low
        elif kind == "cosine_shift":
            v = v + weight * (v_guide - v) + (1 - weight) * low
        else:
            v = v + low
        x = x + (following - sigma) * v
    return x


@torch.no_grad()
def base(reference: Reference, x: Tensor, *, steps: int, guidance: float) -> tuple[Tensor, list[float], list[Tensor]]:
    """A first stage from noise `x` by the pipeline's schedule: latents, levels, and the clean latents of each step."""
    tokens = x.shape[2] * x.shape[3] // 4
    shift = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    levels = shifted_levels(np.linspace(1.0, 1 / steps, steps).tolist(), math.exp(shift))
    kept = []
    for sigma, following in pairwise(levels):
        v = reference.velocity(x, sigma, guidance)
        kept.append(x - sigma * v)
        x = x + (following - sigma) * v
    return x, levels[:-1], kept


@torch.no_grad()
def hiflow(
    reference: Reference,
    target: Tensor,
    fresh: Tensor,
    *,
    levels: list[float],
    kept: list[Tensor],
    guidance: float,
    alpha: float,
) -> tuple[Tensor, list[Tensor]]:
    """HiFlow's upper stage by the last levels of the one below, and the clean latents of each step."""
    tokens, count = target.shape[2] * target.shape[3] // 4, len(levels)
    x = (1 - levels[0]) * target + levels[0] * fresh
    before, followed_before, own = None, None, []
    for index, (sigma, following) in enumerate(pairwise([*levels, 0.0])):
        v = reference.velocity(x, sigma, guidance, tokens=tokens)
        clean = x - sigma * v
        led_by = F.interpolate(kept[index], target.shape[-2:], mode="bicubic", align_corners=False)
        clean = clean + alpha * (count - index) / count * (haar(led_by) - haar(clean))
        v, followed = (x - clean) / (sigma + 1e-6), (x - led_by) / (sigma + 1e-6)
        if before is not None:
            v = v + 0.5 * (count - index) / count * (before + followed - followed_before - v)
        before, followed_before = v, followed
        own.append(x - sigma * v)
        x = x + (following - sigma) * v
    return x, own
