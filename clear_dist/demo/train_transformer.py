"""The demo's transformer and text encoders, trained together on cached latents by rectified flow.

Half of the batches attend through CLEAR's window, so that the base model draws with and without; some are cut out of
larger pictures, at their true positions and without the highest noise, as in the upper stages of a cascade.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from torch import nn

from clear_dist.demo import WINDOW, pipeline, tokenizers
from clear_dist.demo.clear_window import DenseAttnProcessor, window_mask
from clear_dist.demo.grammar import Landscape, caption, training_caption
from clear_dist.demo.train_text import pretrain_clip
from clear_dist.demo.training import Figures, Recipe, fit

BATCH = 16
GRID = 16  # tokens along each side of the native picture
TEXT_LENGTHS, LENGTH_ODDS = (16, 24, 32, 64, 128, 512), (0.1, 0.1, 0.68, 0.07, 0.03, 0.02)
LARGE_ODDS, LARGE_MOST_NOISE, WINDOW_ODDS = 0.1, 0.9, 0.5
STRONG_SHIFT, STRONG_ODDS = 15.0, 0.8
TIME_SHIFT = math.exp(0.5)  # what the scheduler's dynamic shift gives at the native size
RECIPE = Recipe(
    seed=12, peak_rate=1.5e-3, warm_up=0.02, hold=0.7, weight_decay=0.01, most_gradient=1.0, average_decay=0.99,
    report_every=250,
)  # fmt: skip


@dataclasses.dataclass
class LatentSet:
    """Normalised latents [count, 16, h, w] (float16) of square pictures, and their landscapes."""

    latents: torch.Tensor
    landscapes: list[Landscape]


@dataclasses.dataclass
class Batch:
    """Packed latents [B, GRID^2, 64], captions, token positions [GRID^2, 3], and the most noise allowed."""

    latents: torch.Tensor
    captions: list[str]
    image_ids: torch.Tensor
    most_noise: float


def build_models() -> nn.ModuleDict:
    transformer = pipeline.build_transformer()
    transformer.set_attn_processor(DenseAttnProcessor())
    return nn.ModuleDict(
        {
            "transformer": transformer,
            "text_encoder": pipeline.build_clip(),
            "text_encoder_2": pipeline.build_t5(),
        }
    )


def draw_batch(native: LatentSet, large: list[LatentSet], rng: np.random.Generator) -> Batch:
    from_large = len(large) > 0 and rng.random() < LARGE_ODDS
    source = large[rng.integers(len(large))] if from_large else native
    index = rng.integers(0, len(source.latents), BATCH)
    room = source.latents.shape[-1] // 2 - GRID
    top, left = (int(value) for value in rng.integers(0, room + 1, 2))
    side = 2 * GRID
    latents = source.latents[index, :, 2 * top : 2 * top + side, 2 * left : 2 * left + side].float()
    ids = FluxPipeline._prepare_latent_image_ids(BATCH, GRID, GRID, torch.device("cpu"), torch.float32)
    return Batch(
        FluxPipeline._pack_latents(latents, BATCH, 16, side, side),
        [training_caption(source.landscapes[i], rng) for i in index],
        ids + torch.tensor([0.0, top, left]),
        LARGE_MOST_NOISE if from_large else 1.0,
    )


def encode_text(models: nn.ModuleDict, captions: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """T5's tokens [B, length, C] and CLIP's pooled output [B, C], padded without a mask as FluxPipeline does."""
    clip, t5 = _tokenizers()
    settings = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    pooled = models["text_encoder"](clip(captions, max_length=tokenizers.CLIP_LENGTH, **settings).input_ids)
    tokens = models["text_encoder_2"](t5(captions, max_length=length, **settings).input_ids)
    return tokens.last_hidden_state, pooled.pooler_output


@functools.cache
def _tokenizers():
    return tokenizers.clip_tokenizer(), tokenizers.t5_tokenizer()


def draw_sigmas(count: int, most: float) -> torch.Tensor:
    """Logit-normal times [count, 1, 1], shifted to noise, through which pictures this smooth show their colours."""
    shift = torch.where(torch.rand(count, 1, 1) < STRONG_ODDS, STRONG_SHIFT, TIME_SHIFT)
    sigmas = torch.sigmoid(torch.randn(count, 1, 1))
    return most * shift * sigmas / (1 + (shift - 1) * sigmas)


def noised(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents with fresh noise, its share of them (sigmas [B, 1, 1]), and the velocity noise - latents."""
    noise = torch.randn_like(batch.latents)
    sigmas = draw_sigmas(len(noise), batch.most_noise)
    return (1 - sigmas) * batch.latents + sigmas * noise, sigmas, noise - batch.latents


def predict(
    models: nn.ModuleDict, noisy: torch.Tensor, sigmas: torch.Tensor, batch: Batch, text_length: int, window: bool
) -> torch.Tensor:
    """Velocity [B, GRID^2, 64]; the transformer itself multiplies sigmas by 1000."""
    mask = window_mask(text_length, GRID, GRID, WINDOW) if window else None
    with torch.autocast("cpu", torch.bfloat16):
        tokens, pooled = encode_text(models, batch.captions, text_length)
        return models["transformer"](
            hidden_states=noisy, timestep=sigmas.flatten(), encoder_hidden_states=tokens, pooled_projections=pooled,
            txt_ids=torch.zeros(text_length, 3), img_ids=batch.image_ids, return_dict=False,
            joint_attention_kwargs={"attention_mask": mask},
        )[0].float()  # fmt: skip


def flow_loss(models: nn.ModuleDict, batch: Batch, text_length: int, window: bool) -> torch.Tensor:
    """Rectified flow: mean squared error to noise - latents."""
    noisy, sigmas, velocity = noised(batch)
    return F.mse_loss(predict(models, noisy, sigmas, batch, text_length, window), velocity)


@torch.no_grad()
def held_out_loss(models: nn.ModuleDict, held_out: LatentSet, window: bool) -> float:
    state = torch.get_rng_state()
    torch.manual_seed(RECIPE.seed)
    count, losses = len(held_out.latents), []
    ids = FluxPipeline._prepare_latent_image_ids(1, GRID, GRID, torch.device("cpu"), torch.float32)
    for start in range(0, count, BATCH):
        latents = held_out.latents[start : start + BATCH].float()
        packed = FluxPipeline._pack_latents(latents, len(latents), 16, 2 * GRID, 2 * GRID)
        captions = [caption(words) for words in held_out.landscapes[start : start + BATCH]]
        losses.append(flow_loss(models, Batch(packed, captions, ids, 1.0), tokenizers.T5_LENGTH, window).item())
    torch.set_rng_state(state)
    return sum(losses) / len(losses)


def train_transformer(
    output: Path, native: LatentSet, large: list[LatentSet], held_out: LatentSet, minutes: float
) -> nn.ModuleDict:
    """Train for `minutes`, resuming from `output`/transformer.pt; returns the averaged models."""
    torch.manual_seed(RECIPE.seed)
    models, checkpoint = build_models(), output / "transformer.pt"
    if not checkpoint.exists():
        pretrain_clip(models["text_encoder"], Figures(checkpoint))

    def loss(rng: np.random.Generator, _progress: float) -> torch.Tensor:
        text_length = int(rng.choice(TEXT_LENGTHS, p=LENGTH_ODDS))
        return flow_loss(models, draw_batch(native, large, rng), text_length, rng.random() < WINDOW_ODDS)

    def validate(average: nn.ModuleDict, _last: bool) -> dict[str, float]:
        return {kind: held_out_loss(average, held_out, kind == "window") for kind in ("full", "window")}

    return fit(checkpoint, models, loss, validate, RECIPE, minutes)
