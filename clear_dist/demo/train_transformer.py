"""The demo's transformer and text encoders, trained together on cached latents by rectified flow, at several sizes.

Attention is full: windows are learned from this model by `clear-dist distill`. Cut-outs of the largest pictures, at
their true positions and without the highest noise, are what the upper stages of a cascade ask for.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextModel, T5EncoderModel

from clear_dist.demo import pipeline, tokenizers
from clear_dist.demo.dense import DenseAttnProcessor
from clear_dist.demo.grammar import Landscape, caption, training_caption
from clear_dist.demo.train_text import pretrain_clip
from clear_dist.demo.training import Figures, Recipe, fit

TEXT_LENGTHS, LENGTH_ODDS = (16, 32, 64, 512), (0.15, 0.7, 0.12, 0.03)  # each is compiled for each size
STRONG_SHIFT, STRONG_ODDS = 12.0, 0.5
TIME_SHIFT = math.exp(0.5)  # what the scheduler's dynamic shift gives at the native size
RECIPE = Recipe(
    seed=12, peak_rate=8e-4, warm_up=0.02, hold=0.6, weight_decay=0.01, most_gradient=1.0, average_decay=0.995,
    report_every=250,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSet:
    """Normalised latents [count, 16, h, w] (float16) of square pictures, their landscapes, and how they are shown."""

    latents: torch.Tensor
    landscapes: list[Landscape]
    odds: float  # share of the batches
    batch: int
    side: int  # tokens along each side of a cut-out
    most_noise: float = 1.0


@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed latents [B, tokens, 64], captions, token positions [tokens, 3], and the most noise allowed."""

    latents: torch.Tensor
    captions: list[str]
    image_ids: torch.Tensor
    most_noise: float


def build_models(start: Path | None) -> nn.ModuleDict:
    """Models without training, or as in the folder of a pipeline, whose transformer may have fewer single blocks."""
    transformer, clip, t5 = pipeline.build_transformer(), pipeline.build_clip(), pipeline.build_t5()
    if start:
        known = FluxTransformer2DModel.from_pretrained(start, subfolder="transformer", torch_dtype=torch.float32)
        transformer = deepened(known)
        clip = CLIPTextModel.from_pretrained(start / "text_encoder", dtype=torch.float32)
        t5 = T5EncoderModel.from_pretrained(start / "text_encoder_2", dtype=torch.float32)
    transformer.set_attn_processor(DenseAttnProcessor())
    transformer.compile_repeated_blocks(dynamic=False)  # two thirds of the time on a CPU
    return nn.ModuleDict({"transformer": transformer, "text_encoder": clip, "text_encoder_2": t5})


def deepened(known: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """A transformer of the recipe's depth that predicts what `known` does: further single blocks are the identity."""
    transformer = pipeline.build_transformer()
    transformer.load_state_dict(transformer.state_dict() | known.state_dict())
    return transformer


def draw_batch(sets: list[LatentSet], rng: np.random.Generator) -> Batch:
    source = sets[rng.choice(len(sets), p=[each.odds for each in sets])]
    index = rng.integers(0, len(source.latents), source.batch)
    top, left = (int(value) for value in rng.integers(0, source.latents.shape[-1] // 2 - source.side + 1, 2))
    return cut_out(source, index, top, left, [training_caption(source.landscapes[i], rng) for i in index])


def cut_out(source: LatentSet, index: np.ndarray, top: int, left: int, captions: list[str]) -> Batch:
    """Pictures `index` [B] of a set, from token row `top` and column `left` on."""
    count, side = len(index), 2 * source.side
    latents = source.latents[index, :, 2 * top : 2 * top + side, 2 * left : 2 * left + side].float()
    ids = FluxPipeline._prepare_latent_image_ids(count, source.side, source.side, torch.device("cpu"), torch.float32)
    packed = FluxPipeline._pack_latents(latents, count, 16, side, side)
    return Batch(packed, captions, ids + torch.tensor([0.0, top, left]), source.most_noise)


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


def flow_loss(models: nn.ModuleDict, batch: Batch, text_length: int) -> torch.Tensor:
    """Rectified flow: mean squared error to noise - latents. The transformer itself multiplies sigmas by 1000."""
    noisy, sigmas, velocity = noised(batch)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, pooled = encode_text(models, batch.captions, text_length)
        predicted = models["transformer"](
            hidden_states=noisy, timestep=sigmas.flatten(), encoder_hidden_states=tokens, pooled_projections=pooled,
            txt_ids=torch.zeros(text_length, 3), img_ids=batch.image_ids, return_dict=False,
        )[0]  # fmt: skip
    return F.mse_loss(predicted.float(), velocity)


@torch.no_grad()
def held_out_loss(models: nn.ModuleDict, held_out: LatentSet) -> float:
    state = torch.get_rng_state()
    torch.manual_seed(RECIPE.seed)
    losses = []
    for index in np.split(np.arange(len(held_out.latents)), len(held_out.latents) // held_out.batch):
        captions = [caption(held_out.landscapes[i]) for i in index]
        losses.append(flow_loss(models, cut_out(held_out, index, 0, 0, captions), tokenizers.T5_LENGTH).item())
    torch.set_rng_state(state)
    return sum(losses) / len(losses)


def train_transformer(
    output: Path, sets: list[LatentSet], held_out: dict[int, LatentSet], minutes: float, start: Path | None
) -> nn.ModuleDict:
    """Train for `minutes`, resuming from `output`/transformer.pt; returns the averaged models.

    held_out: by pixels along a side; start: folder of a pipeline to begin with.
    """
    torch.manual_seed(RECIPE.seed)
    models, checkpoint = build_models(start), output / "transformer.pt"
    if not checkpoint.exists() and not start:
        pretrain_clip(models["text_encoder"], Figures(checkpoint))

    def loss(rng: np.random.Generator, _progress: float) -> torch.Tensor:
        return flow_loss(models, draw_batch(sets, rng), int(rng.choice(TEXT_LENGTHS, p=LENGTH_ODDS)))

    def validate(average: nn.ModuleDict, _last: bool) -> dict[str, float]:
        return {f"held_out_{pixels}": held_out_loss(average, each) for pixels, each in held_out.items()}

    with torch._dynamo.config.patch(recompile_limit=4 * len(TEXT_LENGTHS)):
        return fit(checkpoint, models, loss, validate, RECIPE, minutes)
