"""Optimisers of other packages, where they are installed: states that a run goes on from."""

from pathlib import Path

import pytest
import torch

from clear_dist.comm.group import Group
from clear_dist.request.distill import OPTIMISERS, Recipe
from clear_dist.training.optimisation import Optimisation


@pytest.mark.parametrize("name", OPTIMISERS)
def test_steps_lower_a_loss_and_go_on_from_a_state(name: str, tmp_path: Path) -> None:
    if OPTIMISERS[name] is not None:
        pytest.importorskip(OPTIMISERS[name])
    settings = Recipe(data=tmp_path, optimizer=name, learning_rate=1.0 if name == "prodigy" else 0.05, weight_decay=0.0)
    start, wanted = torch.randn(64, 64), torch.randn(64, 64)
    group = Group.create("cpu")
    try:
        results = []
        for broken in (False, True):
            weight = torch.nn.Parameter(start.clone())
            made = Optimisation({"weight": weight}, settings, group)
            losses = []
            for step in range(8):
                if broken and step == 4:
                    state = made.state()
                    weight = torch.nn.Parameter(torch.zeros(64, 64))
                    made = Optimisation({"weight": weight}, settings, group)
                    made.restore(state)
                loss = (weight - wanted).square().mean()
                loss.backward()
                made.gather()
                made.step()
                losses.append(loss.item())
            results.append(weight.detach())
            assert losses[-1] < losses[0]
        assert torch.equal(*results)
    finally:
        group.close()
