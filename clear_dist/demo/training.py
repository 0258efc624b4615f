"""What the stages of training share: a moving average of weights, checkpoints, a schedule, figures of the run."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn


class MovingAverage:
    """An exponential moving average of a module's parameters; its half-life grows with the steps taken."""

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
    """The figures of a run: one JSON object per line, appended, and printed."""

    def __init__(self, path: Path, stage: str):
        self.path, self.stage = path, stage

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


def count_parameters(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
