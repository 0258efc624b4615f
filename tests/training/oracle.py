"""Eq. 3 to 6 written apart: stock models, whose attention a dense mask is given to, and plain autograd over all of it."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

STOCK = functional.scaled_dot_product_attention


def circle(count: int, height: int, width: int, radius: int, text_first: bool) -> Tensor:
    """True where a query sees a key."""
    image, text = height * width, count - height * width
    y, x = torch.arange(image) // width, torch.arange(image) % width
    near = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < radius**2
    mask = torch.ones(count, count, dtype=torch.bool)
    part = slice(text, None) if text_first else slice(0, image)
    mask[part, part] = near
    return mask


@contextmanager
def attention(grid: tuple[int, int], radius: int, text_first: bool, blind: tuple[int, ...]) -> Iterator[list[Tensor]]:
    """Context in which calls are masked, but those numbered `blind`, which have no image; collects outputs of all."""
    outputs: list[Tensor] = []

    def masked(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        mask = torch.tensor(True) if attn_mask is None else attn_mask
        if len(outputs) not in blind:
            mask = mask & circle(query.shape[2], *grid, radius, text_first)
        scores = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).masked_fill(~mask, -torch.inf)
        out = scores.softmax(-1) @ value
        outputs.append(out if attn_mask is None else out * attn_mask.transpose(-1, -2))
        return out

    with patch.object(functional, "scaled_dot_product_attention", masked):
        yield outputs


def packed(latents: Tensor) -> Tensor:
    """[B, C, H, W] to tokens of 2 x 2."""
    batch, channels, height, width = latents.shape
    x = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, 4 * channels)


def ids(height: int, width: int, axes: int) -> Tensor:
    return torch.tensor([[0.0, y, x, *[0.0] * (axes - 3)] for y in range(height) for x in range(width)])


def flux(model: Any, noisy: Tensor, sigmas: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
    height, width = noisy.shape[2] // 2, noisy.shape[3] // 2
    guidance = torch.full((len(noisy),), 3.5)
    out = model(packed(noisy), text, pooled, sigmas, ids(height, width, 3), torch.zeros(text.shape[1], 3), guidance)
    tokens = out.sample.reshape(len(noisy), height, width, -1, 2, 2)
    return tokens.permute(0, 3, 1, 4, 2, 5).reshape(noisy.shape)


def flux2(model: Any, noisy: Tensor, sigmas: Tensor, text: Tensor) -> Tensor:
    height, width = noisy.shape[2:]
    text_ids = torch.tensor([[0.0, 0.0, 0.0, i] for i in range(text.shape[1])])
    guidance = torch.full((len(noisy),), 3.5)
    tokens = noisy.reshape(*noisy.shape[:2], -1).transpose(1, 2)
    out = model(tokens, text, sigmas, ids(height, width, 4), text_ids, guidance).sample
    return out.transpose(1, 2).reshape(noisy.shape)


def sd3(model: Any, noisy: Tensor, sigmas: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
    return model(noisy, text, pooled, 1000 * sigmas).sample


def z_image(model: Any, noisy: Tensor, sigmas: Tensor, padded: Tensor, lengths: Tensor) -> Tensor:
    captions = [text[: int(length)] for text, length in zip(padded, lengths, strict=True)]
    out = model([x[:, None] for x in noisy], 1 - sigmas, captions, return_dict=False)[0]
    return -torch.stack([x[:, 0] for x in out])


def step(
    stock: Any,
    forward: Callable[..., Tensor],
    batch: tuple[Tensor, Tensor, Tensor],
    embeddings: list[Tensor],
    *,
    grid: tuple[int, int],
    radius: int,
    text_first: bool,
    blind: tuple[int, ...],
    compared: list[int],
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses (flow, prediction, attention) and all gradients of Eq. 6, alpha = beta = 0.5; calls `compared` in Eq. 5."""
    latents, noise, sigmas = batch
    student, teacher = copy.deepcopy(stock).requires_grad_(True), copy.deepcopy(stock)
    noisy = (1 - sigmas.view(-1, 1, 1, 1)) * latents + sigmas.view(-1, 1, 1, 1) * noise
    with attention(grid, 10**4, text_first, blind) as wanted_outputs, torch.no_grad():
        wanted = forward(teacher, noisy, sigmas, *embeddings)
    with attention(grid, radius, text_first, blind) as outputs:
        predicted = forward(student, noisy, sigmas, *embeddings)
    flow = (predicted - (noise - latents)).square().mean()
    prediction = (predicted - wanted).square().mean()
    layers = [(outputs[call] - wanted_outputs[call]).square().mean() for call in compared]
    attended = torch.stack(layers).mean()
    (flow + 0.5 * prediction + 0.5 * attended).backward()
    gradients = {name: x.grad for name, x in student.named_parameters() if x.grad is not None}
    return [flow.item(), prediction.item(), attended.item()], gradients
