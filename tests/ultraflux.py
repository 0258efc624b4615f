"""UltraFlux, tiny and random, and written apart from the engine: positions by its formula, its VAE in four quarters.

After ultraflux/transformer_flux_visionyarn.py and pipeline_flux.py of W2GenAI-Lab/UltraFlux, and vae.py of
zhang0jhon/diffusion-4k, which UltraFlux's VAE imports.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn

from tests.tiny import ROPE_AXES, make_tiny_pipeline

TOKEN, BASE, THETA = 32, 64, 10_000.0


def make_ultraflux(**options: Any) -> FluxPipeline:
    """As diffusers loads its folder: with what it does not know in the configurations alone."""
    pipe = make_tiny_pipeline(**options)
    pipe.transformer.register_to_config(method="yarn", ntk_factor=4)
    pipe.vae.register_to_config(stride=2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_ultraflux_folder(folder: Path) -> Path:
    make_ultraflux().save_pretrained(folder, safe_serialization=True)
    return folder


def make_official(**options: Any) -> FluxPipeline:
    """Unmodified diffusers but for what UltraFlux's own classes do otherwise."""
    pipe = make_ultraflux(**options)
    pipe.transformer.pos_embed = Positions(ROPE_AXES[16])
    made_official(pipe.vae)
    pipe.vae_scale_factor = 16
    pipe.image_processor = VaeImageProcessor(vae_scale_factor=TOKEN)
    return pipe


def made_official(vae: Any) -> Any:
    stock = vae.encoder.conv_in
    strided = nn.Conv2d(stock.in_channels, stock.out_channels, 3, stride=2, padding=1)
    strided.load_state_dict(stock.state_dict())
    vae.encoder.conv_in, vae.decoder.conv_out = strided.requires_grad_(False), InQuarters(vae.decoder.conv_out)
    return vae


class InQuarters(nn.Module):
    """The decoder's end: each quarter, with what borders on it, enlarged and convolved by itself."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        high, wide = x.shape[2] // 2, x.shape[3] // 2
        rows = []
        for top in (0, high):
            row = []
            for left in (0, wide):
                part = x[:, :, max(top - 1, 0) : top + high + 1, max(left - 1, 0) : left + wide + 1]
                part = F.pad(part, (int(left == 0), int(left > 0), int(top == 0), int(top > 0)))
                out = self.conv(F.interpolate(part, scale_factor=2, mode="nearest"))
                row.append(out[:, :, 1 : 2 * high + 1, 1 : 2 * wide + 1])
            rows.append(torch.cat(row, dim=3))
        return torch.cat(rows, dim=2)


class Positions(nn.Module):
    """Its `FluxPosEmbed`: how long an axis is, ids of text and image together tell."""

    def __init__(self, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        cosines, sines = [], []
        for axis, dim in enumerate(self.axes):
            place = ids[:, axis].float()
            span = int(place.max().item() - place.min().item() + 1)
            frequencies, scale = torch.tensor([THETA ** -(k / dim) for k in range(0, dim, 2)], dtype=torch.float64), 1.0
            if axis > 0 and span > BASE:
                frequencies, scale = with_yarn(dim, span), span / BASE
            angle, temperature = torch.outer(place.double(), frequencies), 0.1 * math.log(scale) + 1.0
            cosines.append(angle.cos().repeat_interleave(2, dim=1).float() * temperature)
            sines.append(angle.sin().repeat_interleave(2, dim=1).float() * temperature)
        return torch.cat(cosines, dim=-1), torch.cat(sines, dim=-1)


def with_yarn(dim: int, span: int) -> Tensor:
    """Frequencies of `get_1d_rotary_pos_embed`, pair by pair."""
    scale, found = span / BASE, []
    for pair in range(dim // 2):
        rotations = BASE * THETA ** (2 * pair / dim) / (2 * math.pi)
        theta_resonant = 2 * math.pi * max(round(rotations), 1) / BASE
        alpha = math.log(theta_resonant) / math.log(THETA)
        base = THETA**-alpha
        ntk = (THETA * scale ** (dim / (dim - 2))) ** -alpha
        beta = 1 - ramp(pair, 1.25, 0.75, dim)
        gamma = 1 - ramp(pair, 16, 2, dim)
        mixed = base / scale * (1 - beta) + ntk * beta
        found.append(mixed * (1 - gamma) + base * gamma)
    return torch.tensor(found, dtype=torch.float64)


def ramp(pair: int, low_rotations: float, high_rotations: float, dim: int) -> float:
    def corrected(rotations: float) -> float:
        return dim * math.log(BASE / (rotations * 2 * math.pi)) / (2 * math.log(THETA))

    low = max(math.floor(corrected(low_rotations)), 0)
    high = min(math.ceil(corrected(high_rotations)), dim - 1, dim // 2)
    high_apart = high + 0.001 if low == high else high
    return min(max((pair - low) / (high_apart - low), 0.0), 1.0)
