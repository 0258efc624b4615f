"""Eq. 4 to 6: the flow's loss, and the distances to the teacher's prediction and to its attention outputs.

Times and noise are drawn as CLEAR's own code does, of each sample by its number: equal on any number of ranks, and
after an interruption.

Shapes: B pictures, C channels, H rows and W columns of latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from clear_dist.training.student import Student

TIMESTEPS = 1000
"""Steps of the scheduler's schedule, which is asked for no shift: sigma is one of 1/1000 ... 1."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Latents of pictures, the mean and deviation that the VAE gave, and the embeddings of their captions."""

    mean: Tensor
    deviation: Tensor
    embeddings: Sequence[Tensor]
    numbers: Sequence[int]
    """Number of each sample in the whole training."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    prediction: float = 0.5
    attention: float = 0.5
    guidance: float = 3.5


@dataclass(frozen=True, kw_only=True)
class Losses:
    flow: Tensor
    prediction: Tensor
    attention: Tensor
    total: Tensor
    teacher: Tensor
    """The flow's loss of the teacher."""


def drawn(batch: Batch, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [B, C, H, W] and noise of that shape, float32, and sigmas [B]."""
    sigmas, sampled, noise = [], [], []
    for mean, number in zip(batch.mean, batch.numbers, strict=True):
        generator = torch.Generator().manual_seed((seed << 40) + number)
        step = int(TIMESTEPS * torch.rand((), generator=generator))
        sigmas.append((TIMESTEPS - step) / TIMESTEPS)
        sampled.append(torch.randn(mean.shape, generator=generator))
        noise.append(torch.randn(mean.shape, generator=generator))
    device = batch.mean.device
    latents = batch.mean.float() + batch.deviation.float() * torch.stack(sampled).to(device)
    return latents, torch.stack(noise).to(device), torch.tensor(sigmas, device=device)


def losses(student: Student, batch: Batch, weights: Weights, *, seed: int, share: float = 1.0) -> Losses:
    """The batch's losses, and in `total` what is to be differentiated: `share` of them, all but attention's.

    Attention's are added to the gradients layer by layer, and so need no place here.
    """
    latents, noise, sigmas = drawn(batch, seed)
    level, dtype = sigmas[:, None, None, None], student.transformer.dtype
    noisy = ((1 - level) * latents + level * noise).to(dtype)
    embeddings = [x.to(dtype) if x.is_floating_point() else x for x in batch.embeddings]
    inputs = student.trainable.inputs(noisy, sigmas, embeddings, weights.guidance)
    passes = student.passes
    with passes.teacher():
        wanted = student.velocity(inputs, latents)
    passes.weight = share * weights.attention / max(len(passes.compared), 1)
    predicted = student.velocity(inputs, latents)
    velocity = noise - latents
    flow, prediction = mse_loss(predicted, velocity), mse_loss(predicted, wanted)
    each = [passes.losses[layer] for layer in sorted(passes.compared)]
    return Losses(
        flow=flow.detach(),
        prediction=prediction.detach(),
        attention=torch.stack(each).mean() if each else torch.zeros((), device=latents.device),
        total=share * (flow + weights.prediction * prediction),
        teacher=mse_loss(wanted, velocity),
    )
