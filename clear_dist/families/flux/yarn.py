"""UltraFlux's rotary positions: YaRN along rows and columns of more than 64 tokens, its turns rounded to whole ones.

What `FluxPosEmbed` of ultraflux/transformer_flux_visionyarn.py, github.com/W2GenAI-Lab/UltraFlux, computes
(arXiv 2511.18050), its turns, which grow where frequencies fall, included.

Shapes: L tokens, D head dim.
"""

from collections.abc import Sequence
from math import ceil, floor, log, tau

import torch
from torch import Tensor

TRAINED = 64
"""Tokens along a side up to which positions are FLUX.1's."""
INTERPOLATED, KEPT = (1.25, 0.75), (16.0, 2.0)
"""Turns within TRAINED between which frequencies go over: from NTK's to interpolated ones, from their own to these."""


def frequencies(channels: int, theta: float, length: int, device: torch.device) -> Tensor:
    """Radians per position of an axis of `length` tokens, [channels / 2] float64."""
    pairs = torch.arange(channels // 2, dtype=torch.float64, device=device)
    powers = 2 * pairs / channels
    if length <= TRAINED:
        return theta**-powers
    scale = length / TRAINED
    own = TRAINED / (tau * (TRAINED * theta**powers / tau).round().clamp_min(1))
    base = theta * scale ** (channels / (channels - 2))
    high = _ramp(pairs, INTERPOLATED, channels, theta)
    extended = torch.lerp(own ** (log(base) / log(theta)), own / scale, high)
    return torch.lerp(own, extended, _ramp(pairs, KEPT, channels, theta))


def cosines_and_sines(ids: Tensor, axes: Sequence[int], theta: float, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines [L, D], float32, of ids [L, 3] of text or of a picture of `size` tokens.

    Along a long axis both grow by YaRN's 1 + 0.1 log(scale), and with them the scores of text and image.
    """
    parts = []
    for place, channels, length in zip(ids.double().unbind(-1), axes, (1, *size), strict=True):
        angles = torch.outer(place, frequencies(channels, theta, length, ids.device)).repeat_interleave(2, dim=1)
        sharper = 1 + 0.1 * log(max(length / TRAINED, 1))
        parts.append([sharper * angles.cos().float(), sharper * angles.sin().float()])
    cosines, sines = zip(*parts, strict=True)
    return torch.cat(cosines, dim=1), torch.cat(sines, dim=1)


def _ramp(pairs: Tensor, turns: tuple[float, float], channels: int, theta: float) -> Tensor:
    """0 to 1 over the pairs of channels that turn so often within TRAINED, in whole pairs."""
    first, last = (channels * log(TRAINED / (each * tau)) / (2 * log(theta)) for each in turns)
    low, high = max(floor(first), 0), min(ceil(last), channels // 2)
    return ((pairs - low) / (high - low or 0.001)).clamp(0, 1)
