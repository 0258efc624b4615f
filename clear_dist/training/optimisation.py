"""Steps of an optimiser on float32 masters of what trains: gradients, their norm, the rate, and a moving average.

Each rank has its share of the masters and of the optimiser's state; the model's own weights may be bfloat16.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from clear_dist.comm.data_parallel import norm_over_ranks, share_of, whole
from clear_dist.comm.group import Group
from clear_dist.request.distill import Recipe

BETAS, EPS = (0.9, 0.999), 1e-8


def _adamw(shares: Sequence[Tensor], recipe: Recipe, ranks: int) -> torch.optim.Optimizer:
    decay = recipe.weight_decay
    return torch.optim.AdamW(shares, lr=recipe.learning_rate, betas=BETAS, eps=EPS, weight_decay=decay)


def _adamw_8bit(shares: Sequence[Tensor], recipe: Recipe, ranks: int) -> torch.optim.Optimizer:
    kind = import_module("torchao.optim").AdamW8bit
    return kind(shares, lr=recipe.learning_rate, betas=BETAS, eps=EPS, weight_decay=recipe.weight_decay)


def _prodigy(shares: Sequence[Tensor], recipe: Recipe, ranks: int) -> torch.optim.Optimizer:
    """As CLEAR's script sets it; `fsdp_in_use` makes its estimate one of all ranks' shares."""
    return import_module("prodigyopt").Prodigy(
        shares,
        lr=recipe.learning_rate,
        betas=BETAS,
        eps=EPS,
        weight_decay=recipe.weight_decay,
        decouple=True,
        use_bias_correction=True,
        safeguard_warmup=True,
        fsdp_in_use=ranks > 1,
    )


OPTIMISERS: Mapping[str, Callable[[Sequence[Tensor], Recipe, int], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw_8bit,
    "prodigy": _prodigy,
}


class Optimisation:
    def __init__(self, trained: Mapping[str, nn.Parameter], recipe: Recipe, group: Group) -> None:
        self._trained, self._group, self._recipe = dict(trained), group, recipe
        self.masters = [nn.Parameter(share_of(x).detach().float().clone()) for x in trained.values()]
        self.average = [master.detach().clone() for master in self.masters] if recipe.ema_decay else None
        self.optimiser = OPTIMISERS[recipe.optimizer](self.masters, recipe, group.size)
        self.schedule = get_scheduler(
            recipe.lr_scheduler,
            self.optimiser,
            num_warmup_steps=recipe.lr_warmup_steps,
            num_training_steps=recipe.steps,
        )
        self.steps = 0

    @property
    def rate(self) -> float:
        """Learning rate; Prodigy's estimate is part of it."""
        group = self.optimiser.param_groups[0]
        return float(group["lr"]) * float(group.get("d", 1.0))

    def gather(self) -> None:
        """Add the gradients of a part of a batch, in float32."""
        for parameter, master in zip(self._trained.values(), self.masters, strict=True):
            if parameter.grad is not None:
                gradient = share_of(parameter.grad).float()
                master.grad = gradient.clone() if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    def step(self) -> float:
        """Take a step; returns the norm of the gradients before they were clipped."""
        gradients = [master.grad for master in self.masters if master.grad is not None]
        norm = norm_over_ranks(gradients, self._group)
        factor = (self._recipe.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.schedule.step()
        self.steps += 1
        if self.average is not None:
            decay = min(self._recipe.ema_decay, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(self.average, [master.detach() for master in self.masters], 1 - decay)
        self._into_model()
        return norm.item()

    @torch.no_grad()
    def _into_model(self) -> None:
        for parameter, master in zip(self._trained.values(), self.masters, strict=True):
            share_of(parameter).copy_(master)

    def result(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors of a CLEAR file, the moving average where there is one, on the CPU of every rank."""
        held = self.average or [master.detach() for master in self.masters]
        pairs = zip(self._trained.items(), held, strict=True)
        return {name: whole(share, like).to("cpu", dtype).contiguous() for (name, like), share in pairs}

    def state(self) -> dict[str, Any]:
        """All that a later run goes on from, of this rank."""
        return {
            "steps": self.steps,
            "masters": [master.detach() for master in self.masters],
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for master, held in zip(self.masters, state["masters"], strict=True):
            master.copy_(held)
        self.average = state["average"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self._into_model()
