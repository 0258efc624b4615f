"""Frequencies of rotary embeddings above the native size: another base, and no frequency too low (clipped NTK)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from clear_dist.engine.extrapolation import Extrapolation


def frequencies(channels: int, theta: float, beyond: Extrapolation, device: torch.device) -> Tensor:
    """Radians per position of an axis, [channels / 2] float64: max(w(ntk_factor theta), least_frequency w(theta)).

    w(theta) = theta^(-2 k / channels); the second one is I-Max's bound, w / sqrt(tokens / native tokens).
    """
    powers = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels
    extended, stock = (beyond.ntk_factor * theta) ** -powers, theta**-powers
    return torch.maximum(extended, beyond.least_frequency * stock)


def cosines_and_sines(ids: Tensor, axes: Sequence[int], theta: float, beyond: Extrapolation) -> tuple[Tensor, Tensor]:
    """Cosines and sines [L, D], float32, of positions [L, axes], each angle for two channels beside each other."""
    pairs = zip(ids.double().unbind(-1), axes, strict=True)
    angles = torch.cat([torch.outer(x, frequencies(each, theta, beyond, ids.device)) for x, each in pairs], dim=1)
    doubled = angles.repeat_interleave(2, dim=1)
    return doubled.cos().float(), doubled.sin().float()
