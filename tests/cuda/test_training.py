"""Distillation on null GPUs: FlexAttention with its backward pass, FSDP2 over NCCL, memory beside the plan."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clear_dist.cards.folder import find_model
from clear_dist.families.cards import CARDS
from clear_dist.plan.model import find
from clear_dist.plan.questions import Module
from clear_dist.request.distill import Recipe
from clear_dist.training.budget import budget_of
from clear_dist.training.counted import count
from clear_dist.training.patterns.circle import Circle
from tests.cuda.null_gpu import Machine, NullGpus
from tests.cuda.training import BLOCKS, SIDE, TEXT

WITHIN = 0.1
"""Share of the planned memory."""
CASES: list[Any] = [
    (1, {"window": 8, "down_factor": 4}),
    (2, {"window": 8, "gradient_checkpointing": True, "batch_size": 2}),
    pytest.param(2, {"window": 16, "teacher": "int8", "ema_decay": 0.9}, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("ranks", "settings"), CASES)
def test_updates_take_what_was_planned(
    ranks: int, settings: dict[str, Any], null_gpus: NullGpus, tmp_path: Path
) -> None:
    arguments = tmp_path, str(ranks), json.dumps(settings)
    ended = null_gpus.run("-m", "tests.cuda.training", *arguments, machine=Machine(gpus=ranks), folder=tmp_path)
    assert ended.status == 0, ended.err
    found = json.loads((tmp_path / "0").read_text())
    model = find(find_model("flux-dev", CARDS, has_cuda=True))
    assert model is not None
    few = replace(model, transformer=Module(kind=model.transformer.kind, config=model.transformer.config | BLOCKS))
    recipe = Recipe(data=tmp_path, **settings)
    pattern = Circle(radius=recipe.window, down_factor=recipe.down_factor)
    counted = count(
        few, pattern, (SIDE, SIDE), batch=recipe.batch_size, text_tokens=TEXT, dtype="bfloat16",
        teacher=recipe.teacher, every=1,
    )  # fmt: skip
    planned = budget_of(recipe, ranks, counted, None)
    assert found["allocated"] == pytest.approx(planned.total, rel=WITHIN)
