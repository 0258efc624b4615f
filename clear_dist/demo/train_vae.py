"""AutoencoderKL of the demo: 8x, 16 latent channels, narrow at full resolution, trained on crops of renders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from clear_dist.demo import data
from clear_dist.demo.training import Recipe, fit

WIDTHS = (16, 32, 64, 128)
CROP, BATCH = 128, 4
WHOLE_BATCH, WHOLE_FROM = 2, 0.85  # after this share of the budget whole pictures, whose norms see what users will
LATENT_NOISE, KL_WEIGHT, LOG_VARIANCE = 0.1, 5e-4, -12.0
RECIPE = Recipe(
    seed=11, peak_rate=1.5e-3, warm_up=0.02, hold=0.8, weight_decay=1e-4, most_gradient=1.0, average_decay=0.998,
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


def random_batch(pictures: np.ndarray, rng: np.random.Generator, size: int, count: int) -> torch.Tensor:
    """Crops [count, 3, size, size], half of them mirrored."""
    top, left = rng.integers(0, (data.SIZE - size) // 8 + 1, (2, count)) * 8
    index = rng.integers(0, len(pictures), count)
    crops = [pictures[i, y : y + size, x : x + size] for i, y, x in zip(index, top, left, strict=True)]
    batch = to_tensor(np.stack(crops))
    return batch.flip(3) if rng.random() < 0.5 else batch


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 and squared error of the pixels, and L1 of their differences to the right and downwards (edges)."""
    error = output - target
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges


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


def train_vae(output: Path, pictures: np.ndarray, held_out: np.ndarray, minutes: float) -> AutoencoderKL:
    """Train for `minutes`, resuming from `output`/vae.pt; returns the averaged weights."""
    torch.manual_seed(RECIPE.seed)
    vae = build_vae()

    def loss(rng: np.random.Generator, progress: float) -> torch.Tensor:
        size, count = (CROP, BATCH) if progress < WHOLE_FROM else (data.SIZE, WHOLE_BATCH)
        return training_loss(vae, random_batch(pictures, rng, size, count))

    def validate(average: AutoencoderKL, last: bool) -> dict[str, float]:
        return {"psnr": psnr(average, held_out if last else held_out[:16])}

    return fit(output / "vae.pt", vae, loss, validate, RECIPE, minutes)


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pictures: np.ndarray) -> torch.Tensor:
    """Means of square pictures' latents, not normalised: float32 [count, 16, size / 8, size / 8]."""
    parts, batch_size = [], max(1, 8 * data.SIZE**2 // pictures.shape[1] ** 2)
    for start in range(0, len(pictures), batch_size):
        with torch.autocast("cpu", torch.bfloat16):
            moments = vae.encoder(to_tensor(pictures[start : start + batch_size]))
        parts.append(moments[:, :16].float())
    return torch.cat(parts)
