"""AutoencoderKL of the demo: 8x, 16 latent channels, narrow at full resolution, trained on whole renders.

Whole, since each norm has one group and sees the picture that a user will see: on crops colours drift.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from clear_dist.demo import data
from clear_dist.demo.training import Recipe, fit

WIDTHS = (16, 32, 64, 128)
LARGE_ODDS = 0.06
LATENT_NOISE, KL_WEIGHT, LOG_VARIANCE = 0.1, 5e-4, -12.0
RECIPE = Recipe(
    seed=11, peak_rate=8e-4, warm_up=0.02, hold=0.6, weight_decay=1e-4, most_gradient=1.0, average_decay=0.998,
    report_every=400,
)  # fmt: skip


def build_vae() -> AutoencoderKL:
    """FLUX's autoencoder (no quant convolutions, no attention), with few channels and a fixed small variance."""
    vae = AutoencoderKL(
        block_out_channels=WIDTHS,
        down_block_types=("DownEncoderBlock2D",) * len(WIDTHS),
        up_block_types=("UpDecoderBlock2D",) * len(WIDTHS),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=1,  # more groups in so few channels would normalise the colours away
        sample_size=data.SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    with torch.no_grad():  # the second half of the encoder's output is the log-variance, which no loss touches
        vae.encoder.conv_out.weight[16:] = 0
        vae.encoder.conv_out.bias[16:] = LOG_VARIANCE
    return vae


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def random_picture(pictures: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """One whole picture [1, 3, H, W], in half of the cases mirrored."""
    picture = to_tensor(pictures[rng.integers(len(pictures))][None]).contiguous(memory_format=torch.channels_last)
    return picture.flip(3) if rng.random() < 0.5 else picture


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 and squared error of the pixels, and L1 of their differences to the right and downwards (edges)."""
    error = output - target
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 4 * error.square().mean() + 0.5 * edges


def training_loss(vae: AutoencoderKL, batch: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        mean = vae.encoder(batch)[:, :16]
        noisy = mean + LATENT_NOISE * torch.randn_like(mean)
        output = vae.decoder(noisy)
    return reconstruction_loss(output.float(), batch) + KL_WEIGHT * mean.float().square().mean()


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: np.ndarray) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB, in float32."""
    values = []
    for start in range(0, len(pictures), 8):
        batch = to_tensor(pictures[start : start + 8])
        output = vae.decode(vae.encode(batch).latent_dist.mode()).sample.clamp(-1, 1)
        errors = ((output - batch) / 2).square().mean(dim=(1, 2, 3))
        values += (-10 * errors.log10()).tolist()
    return float(np.mean(values))


def begin(start: Path | None) -> AutoencoderKL:
    """A VAE without training, or that of a pipeline's folder."""
    vae = AutoencoderKL.from_pretrained(start, subfolder="vae", torch_dtype=torch.float32) if start else build_vae()
    return vae.to(memory_format=torch.channels_last)  # a fifth faster on a CPU


def train_vae(
    checkpoint: Path, vae: AutoencoderKL, pictures: Mapping[str, np.ndarray], minutes: float
) -> AutoencoderKL:
    """Train what requires gradients for `minutes`, resuming from `checkpoint`; returns the averaged weights.

    `pictures`: "native" and "held_out", bytes [count, 256, 256, 3], and "large", bytes [count, 512, 512, 3].
    """
    torch.manual_seed(RECIPE.seed)

    def loss(rng: np.random.Generator, _progress: float) -> torch.Tensor:
        return training_loss(vae, random_picture(pictures["large" if rng.random() < LARGE_ODDS else "native"], rng))

    def validate(average: AutoencoderKL, last: bool) -> dict[str, float]:
        return {"psnr": psnr(average, pictures["held_out"][: None if last else 16])}

    return fit(checkpoint, vae, loss, validate, RECIPE, minutes)


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pictures: np.ndarray) -> torch.Tensor:
    """Means of square pictures' latents, not normalised: float32 [count, 16, size / 8, size / 8]."""
    parts, batch_size = [], max(1, 8 * data.SIZE**2 // pictures.shape[1] ** 2)
    for start in range(0, len(pictures), batch_size):
        with torch.autocast("cpu", torch.bfloat16):
            moments = vae.encoder(to_tensor(pictures[start : start + batch_size]))
        parts.append(moments[:, :16].float())
    return torch.cat(parts)
