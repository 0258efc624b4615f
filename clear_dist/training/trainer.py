"""The training itself: batches, losses, updates, checkpoints; N ranks do what one does with N times the batch."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from clear_dist.comm.data_parallel import shard
from clear_dist.comm.group import Group
from clear_dist.engine.family import Family
from clear_dist.launch.ends import Failure
from clear_dist.request.distill import Recipe
from clear_dist.training.checkpoint import Checkpoints, last_good
from clear_dist.training.losses import Batch, Losses, Weights, losses
from clear_dist.training.optimisation import Optimisation
from clear_dist.training.samples import Samples
from clear_dist.training.student import Student

RESULT = {"bfloat16": torch.bfloat16, "float32": torch.float16}
"""dtype of the result; float16 keeps more of float32's digits."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of one update, means over its whole batch."""

    step: int
    flow: float
    prediction: float
    attention: float
    total: float
    rate: float
    norm: float
    seconds: float


class Trainer:
    def __init__(self, student: Student, family: Family, samples: Samples, recipe: Recipe, group: Group) -> None:
        """Shard the student, and go on from the newest checkpoint; raises a Refusal where it is another recipe's."""
        self.student, self.samples, self.recipe, self.group = student, samples, recipe, group
        self.weights = Weights(
            prediction=recipe.prediction_weight, attention=recipe.attention_weight, guidance=recipe.guidance_scale
        )
        if recipe.gradient_checkpointing:
            student.transformer.enable_gradient_checkpointing()
        shard(student.transformer, family.blocks, group, whole=student.quantised)
        self.optimisation = Optimisation(student.trained, recipe, group)
        self.checkpoints = Checkpoints(recipe, group)
        state = self.checkpoints.read()
        if state is not None:
            self.optimisation.restore(state)
            newest = self.checkpoints.newest
            assert newest is not None, "it has just been read"
            self.checkpoints.publish(newest)  # a run may have been killed before it did

    def run(self, told: Callable[[Figures], None]) -> None:
        """Train to the last step; `told` of each update. Raises a Failure for a loss that is no number."""
        recipe = self.recipe
        while (done := self.optimisation.steps) < recipe.steps:
            told(self._update(done))
            if recipe.is_kept(done + 1):
                self.save()

    def save(self) -> None:
        optimisation = self.optimisation
        result = optimisation.result(RESULT[str(self.student.transformer.dtype).rpartition(".")[2]])
        self.checkpoints.publish(self.checkpoints.write(optimisation.steps, optimisation.state(), result))

    def _update(self, done: int) -> Figures:
        began, recipe, group = time.perf_counter(), self.recipe, self.group
        parts, size = recipe.gradient_accumulation_steps, recipe.batch_size
        sums = torch.zeros(3, device=group.device)
        for part in range(parts):
            first = ((done * parts + part) * group.size + group.rank) * size
            found = self._losses(self.samples.batch(range(first, first + size), group.device), 1 / parts)
            found.total.backward()
            self.optimisation.gather()
            sums += torch.stack([found.flow, found.prediction, found.attention]) / parts
        flow, prediction, attention = (group.all_reduce(sums, "sum") / group.size).tolist()
        total = flow + recipe.prediction_weight * prediction + recipe.attention_weight * attention
        rate = self.optimisation.rate
        norm = self.optimisation.step() if total - total == 0 else float("nan")
        if norm - norm != 0:
            good = last_good(recipe.output)
            raise Failure(f"the loss is {total} and its gradient's norm {norm} in step {done + 1}; {good}")
        return Figures(
            step=done + 1,
            flow=flow,
            prediction=prediction,
            attention=attention,
            total=total,
            rate=rate,
            norm=norm,
            seconds=time.perf_counter() - began,
        )

    def _losses(self, batch: Batch, share: float) -> Losses:
        return losses(self.student, batch, self.weights, seed=self.recipe.seed, share=share)

    @torch.no_grad()
    def held_out(self) -> tuple[float, float] | None:
        """Flow losses of student and teacher for samples kept from training, their noise ever the same; None: none."""
        batches = self.samples.held_out(self.recipe.batch_size, self.group.device)
        if not batches:
            return None
        found = [(self._losses(batch, 1.0), len(batch.mean)) for batch in batches]
        count = sum(size for _, size in found)
        student = sum(each.flow.item() * size for each, size in found) / count
        return student, sum(each.teacher.item() * size for each, size in found) / count
