"""What --plan counts, at reduced depth, against what is known by other ways."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clear_dist.cards.folder import find_model
from clear_dist.families.cards import CARDS
from clear_dist.plan.model import find
from clear_dist.plan.questions import Module
from clear_dist.request.distill import READY, DistillFlags, read_recipe
from clear_dist.training.counted import Counted, count
from clear_dist.training.patterns.circle import Circle

CHANNELS, TOKENS, TEXT = 3072, 64 * 64, 512


def flux(double: int, single: int, *, batch: int = 1, **given: Any) -> Counted:
    model = find(find_model("flux-dev", CARDS, has_cuda=True))
    assert model is not None
    config = {**model.transformer.config, "num_layers": double, "num_single_layers": single}
    small = replace(model, transformer=Module(kind=model.transformer.kind, config=config))
    settings = {"batch": batch, "text_tokens": TEXT, "dtype": "bfloat16", "teacher": "same", "every": 1} | given
    return count(small, Circle(radius=8, down_factor=4), (64, 64), **settings)


def test_weights_and_operations_of_flux() -> None:
    one, two = flux(1, 1), flux(1, 2)
    linear = CHANNELS**2 + CHANNELS
    assert one.trained == 7 * linear + 2 * 16
    assert two.trained - one.trained == 3 * linear + 16
    tokens = TOKENS + TEXT
    assert two.teacher - one.teacher == 4 * CHANNELS * tokens**2
    # A single block's products: 12 channels^2 a token, and its modulation, 3 channels^2 for a picture.
    products = 2 * 12 * CHANNELS**2 * tokens + 2 * 3 * CHANNELS**2
    assert two.products - one.products == pytest.approx(products + 4 * CHANNELS * tokens**2 * 0, rel=1e-3)
    assert two.compared == 2 * tokens * CHANNELS * 2
    assert two.saved > one.saved + 10 * tokens * CHANNELS * 2
    assert flux(1, 1, batch=2).saved == pytest.approx(2 * one.saved, rel=0.1)
    assert flux(1, 1, teacher="int8").frozen == pytest.approx(one.frozen - 7 * CHANNELS**2, rel=1e-3)
    assert torch.bfloat16.itemsize == one.itemsize


@pytest.mark.parametrize("file", sorted(READY.glob("*.toml")), ids=lambda file: file.stem)
def test_ready_recipes_are_read_by_their_names(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the result of a run lies beside, in a folder of that name."""
    monkeypatch.chdir(tmp_path)
    Path(file.stem).mkdir()
    flags: Any = DistillFlags
    recipe = read_recipe(flags(config=Path(file.stem), data=Path("data")))
    assert recipe.output == Path(file.stem)
    down = f"_down_{recipe.down_factor}" if recipe.down_factor > 1 else ""
    assert recipe.checkpoint_name == f"clear_local_{recipe.window}{down}.safetensors"
