"""CLEAR's own recipe on the demo: the image side of attention learns the window from the base with full attention.

The loss is the flow's, plus distances to the teacher's prediction and to its attention outputs at image tokens.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from clear_dist.demo.clear_window import image_side
from clear_dist.demo.tokenizers import T5_LENGTH
from clear_dist.demo.train_transformer import (
    GRID,
    Batch,
    LatentSet,
    draw_batch,
    held_out_loss,
    noised,
    predict,
)
from clear_dist.demo.training import Figures, Recipe, fit

PREDICTION_WEIGHT, ATTENTION_WEIGHT = 0.5, 0.5
RECIPE = Recipe(
    seed=13, peak_rate=2e-4, warm_up=0.1, hold=0.6, weight_decay=0.0, most_gradient=math.inf, average_decay=0.99,
    report_every=50,
)  # fmt: skip


@contextmanager
def recorded_attention(transformer: Any) -> Iterator[list[torch.Tensor]]:
    """Collect the attention outputs at image tokens, [B, GRID^2, C] per layer, of one forward."""
    outputs: list[torch.Tensor] = []

    def record(_module: nn.Module, _inputs: tuple, output: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> None:
        image = output[0] if isinstance(output, tuple) else output[:, -GRID * GRID :]
        outputs.append(image.float())

    blocks = itertools.chain(transformer.transformer_blocks, transformer.single_transformer_blocks)
    handles = [block.attn.register_forward_hook(record) for block in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def distillation_loss(student: nn.ModuleDict, teacher: nn.ModuleDict, batch: Batch) -> torch.Tensor:
    noisy, sigmas, velocity = noised(batch)
    with torch.no_grad(), recorded_attention(teacher["transformer"]) as wanted:
        wanted_prediction = predict(teacher, noisy, sigmas, batch, T5_LENGTH, window=False)
    with recorded_attention(student["transformer"]) as outputs:
        prediction = predict(student, noisy, sigmas, batch, T5_LENGTH, window=True)
    flow = F.mse_loss(prediction, velocity)
    attention = torch.stack([F.mse_loss(a, b) for a, b in zip(outputs, wanted, strict=True)]).mean()
    return flow + PREDICTION_WEIGHT * F.mse_loss(prediction, wanted_prediction) + ATTENTION_WEIGHT * attention


def train_clear(
    output: Path, base: nn.ModuleDict, native: LatentSet, large: list[LatentSet], held_out: LatentSet, minutes: float
) -> Path:
    """Fine-tune for `minutes`, resuming from `output`/clear.pt; returns the checkpoint's file."""
    torch.manual_seed(RECIPE.seed)
    teacher, student = copy.deepcopy(base).requires_grad_(False), copy.deepcopy(base).requires_grad_(False)
    for parameter in image_side(student["transformer"]).values():
        parameter.requires_grad_(True)
    checkpoint = output / "clear.pt"

    def loss(rng: np.random.Generator, _progress: float) -> torch.Tensor:
        return distillation_loss(student, teacher, draw_batch(native, large, rng))

    def validate(average: nn.ModuleDict, _last: bool = False) -> dict[str, float]:
        return {"window": held_out_loss(average, held_out, window=True)}

    if not checkpoint.exists():
        Figures(checkpoint).add(step=0, minutes=0.0, **validate(student))
    average = fit(checkpoint, student, loss, validate, RECIPE, minutes)
    path = output / "clear_local_8.safetensors"
    layers = image_side(average["transformer"])
    save_file({name: value.half().contiguous() for name, value in layers.items()}, path)
    return path
