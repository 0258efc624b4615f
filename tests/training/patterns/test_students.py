"""Students of all families learn by every pattern: what a layer learns besides its projections trains, too."""

from itertools import cycle

import pytest
import torch

from clear_dist.training.losses import Batch, Weights, losses
from clear_dist.training.patterns import PATTERNS, pattern_of
from clear_dist.training.student import Student
from tests.training.models import GRID, TINY

LEARNED = {"convolved": {"key_kernel", "value_kernel"}, "slots": {"slots"}}


@pytest.mark.parametrize(("name", "family"), list(zip(PATTERNS, cycle(TINY), strict=False)))
def test_updates_lower_the_loss(name: str, family: str) -> None:
    tiny = TINY[family]
    torch.manual_seed(torch.seed())
    student = Student.of(tiny.transformer(), pattern_of(name, 2), GRID)
    batch = Batch(
        mean=torch.randn(3, *tiny.latents), deviation=torch.zeros(3, *tiny.latents), embeddings=tiny.texts(3),
        numbers=[4, 9, 77],
    )  # fmt: skip
    own = {key.rpartition(".")[2] for key in student.trained if ".processor." in key}
    assert own == LEARNED.get(name, set())
    optimiser = torch.optim.AdamW(student.trained.values(), lr=1e-3)
    distances = []
    for _ in range(6):
        found = losses(student, batch, Weights(), seed=5)
        found.total.backward()
        assert all(each.grad is not None and each.grad.abs().max() > 0 for each in student.trained.values())
        optimiser.step()
        optimiser.zero_grad()
        distances.append((found.flow + 0.5 * found.prediction + 0.5 * found.attention).item())
    assert distances[-1] < distances[0]
