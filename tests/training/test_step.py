"""One step of each family against Eq. 3 to 6 written apart, losses and gradients."""

import copy

import pytest
import torch

from clear_dist.training.losses import Batch, Weights, drawn, losses
from clear_dist.training.patterns.circle import Circle
from clear_dist.training.student import Student
from tests.training import oracle
from tests.training.models import GRID, TINY

RADIUS = 3


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", TINY)
def test_losses_and_gradients_are_those_of_dense_attention(family: str, checkpointing: bool) -> None:
    tiny = TINY[family]
    torch.manual_seed(torch.seed())
    stock = tiny.transformer()
    texts = tiny.texts(3)
    batch = Batch(
        mean=torch.randn(3, *tiny.latents), deviation=torch.rand(3, *tiny.latents), embeddings=texts, numbers=[4, 9, 77]
    )
    wanted, gradients = oracle.step(
        stock, tiny.forward, drawn(batch, 5), texts, grid=GRID, radius=RADIUS, text_first=tiny.text_first,
        blind=tiny.blind, compared=tiny.compared,
    )  # fmt: skip
    student = Student.of(copy.deepcopy(stock), Circle(radius=RADIUS), GRID)
    if checkpointing:
        student.transformer.enable_gradient_checkpointing()
    found = losses(student, batch, Weights(), seed=5)
    found.total.backward()
    got = [found.flow.item(), found.prediction.item(), found.attention.item()]
    assert got == pytest.approx(wanted, abs=1e-5)
    assert min(wanted) > 1e-4
    assert len(student.trained) > 3
    for name, parameter in student.trained.items():
        assert parameter.grad is not None, name
        torch.testing.assert_close(
            parameter.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
