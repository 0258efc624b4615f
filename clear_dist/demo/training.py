"""Common to the stages of training: the loop `fit` with its checkpoints, schedule and moving average; figures."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Numbers of one stage; `warm_up` and `hold` are shares of its minutes."""

    seed: int
    peak_rate: float
    warm_up: float
    hold: float
    weight_decay: float
    most_gradient: float  # longer gradients are shortened to this norm
    average_decay: float
    report_every: int  # steps from one checkpoint, with its figures, to the next


class MovingAverage:
    """Exponential moving average of a module's parameters; its half-life grows with the steps taken."""

    def __init__(self, module: nn.Module, decay: float):
        self.module: Any = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        pairs = list(zip(self.module.parameters(), module.parameters(), strict=True))
        torch._foreach_lerp_([mean for mean, _ in pairs], [now.detach() for _, now in pairs], 1 - decay)


def learning_rate(progress: float, peak: float, warm_up: float = 0.02, hold: float = 0.6) -> float:
    """Linear warm-up, the peak until `hold`, then a straight line to zero; `progress` runs from 0 to 1."""
    return peak * max(0.01, min(1.0, progress / warm_up, (1 - progress) / (1 - hold)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def save_checkpoint(path: Path, **state: Any) -> None:
    """Written beside, then moved, so that an interrupted run leaves a whole checkpoint."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


class Figures:
    """Figures of a run, a JSON object per line, appended to figures.jsonl beside the checkpoint and printed."""

    def __init__(self, checkpoint: Path):
        self.path, self.stage = checkpoint.with_name("figures.jsonl"), checkpoint.stem

    def add(self, **values: Any) -> None:
        row = {"stage": self.stage, **{k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


class Stopwatch:
    """Minutes of training, carried over a resumption; `progress` is the share of the budget used."""

    def __init__(self, minutes: float, used: float = 0.0):
        self.minutes, self.used, self.started = minutes, used, time.monotonic()

    @property
    def elapsed(self) -> float:
        return self.used + (time.monotonic() - self.started) / 60

    @property
    def progress(self) -> float:
        return min(1.0, self.elapsed / self.minutes)


def fit(
    checkpoint: Path,
    module: nn.Module,
    loss: Callable[[np.random.Generator, float], torch.Tensor],
    validate: Callable[[Any, bool], dict[str, float]],
    recipe: Recipe,
    minutes: float,
) -> Any:
    """Train the parameters of `module` that require gradients for `minutes`; returns its moving average.

    Goes on from `checkpoint` if any; `loss` gets (rng, progress), `validate` (average, whether this is the end).
    """
    average, trained = MovingAverage(module, recipe.average_decay), [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=recipe.weight_decay, foreach=True)
    step, used = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        module.load_state_dict(state["model"])
        average.module.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, used = state["step"], state["minutes"]
    clock, rng, figures = Stopwatch(minutes, used), np.random.default_rng(recipe.seed + step), Figures(checkpoint)
    losses: list[float] = []
    last = clock.progress >= 1
    while not last:
        progress = clock.progress
        set_learning_rate(optimizer, learning_rate(progress, recipe.peak_rate, recipe.warm_up, recipe.hold))
        value = loss(rng, progress)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, recipe.most_gradient)
        optimizer.step()
        step += 1
        average.update(module, step)
        losses.append(value.item())
        last = clock.progress >= 1  # asked once a step: minutes that run out during validation cost one more step
        if last or step % recipe.report_every == 0:
            save_checkpoint(
                checkpoint, model=module.state_dict(), average=average.module.state_dict(),
                optimizer=optimizer.state_dict(), step=step, minutes=clock.elapsed,
            )  # fmt: skip
            mean_loss = float(np.mean(losses))
            figures.add(step=step, minutes=clock.elapsed, loss=mean_loss, **validate(average.module, last))
            losses.clear()
    return average.module
