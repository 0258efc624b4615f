"""Several updates: they lower the loss, are equal on two ranks, and go on after an interruption bit for bit."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clear_dist.cards.clear import require_same_tensors, with_spatial_weights
from clear_dist.comm.group import Group
from clear_dist.families.transformers import family_of
from clear_dist.request.distill import Recipe
from clear_dist.training.losses import Weights, losses
from clear_dist.training.patterns.circle import Circle
from clear_dist.training.samples import Samples
from clear_dist.training.student import Student
from clear_dist.training.trainer import Figures, Trainer
from clear_dist.weights.clear import image_attention_parameters, load_clear_weights
from tests.ranks import run_ranks
from tests.training.models import GRID, TINY


def make_samples(folder: Path, family: str, count: int) -> Path:
    """A cache of random samples, in shards of three."""
    tiny = TINY[family]
    folder.mkdir()
    texts = [tiny.texts(1) for _ in range(count)]
    for first in range(0, count, 3):
        tensors = {}
        for index in range(first, min(first + 3, count)):
            tensors |= {f"{index:06}.{name}": torch.rand(tiny.latents) for name in ("mean", "std")}
            tensors |= {f"{index:06}.{place}": text[0].contiguous() for place, text in enumerate(texts[index])}
        save_file(tensors, folder / f"{first:06}.safetensors")
    return folder


def recipe(output: Path, **settings: object) -> Recipe:
    given = {"data": Path("anywhere"), "output": output, "window": 2, "learning_rate": 3e-3, "checkpointing_steps": 4}
    return Recipe(**given | settings)


def trainer(group: Group, family: str, cache: Path, settings: Recipe) -> Trainer:
    torch.manual_seed(0)
    transformer = TINY[family].transformer()
    adapted = family_of(transformer)
    pattern = Circle(radius=settings.window, down_factor=settings.down_factor)
    student = Student.of(transformer, pattern, GRID, teacher=settings.teacher)
    return Trainer(student, adapted, Samples(cache, settings.held_out, settings.seed), settings, group)


def trained(group: Group, family: str, cache: Path, settings: Recipe) -> list[Figures]:
    figures: list[Figures] = []
    trainer(group, family, cache, settings).run(figures.append)
    return figures


@torch.no_grad()
def loss(made: Trainer) -> float:
    """Eq. 6 at equal times and noise."""
    found = losses(made.student, made.samples.batch(range(4), torch.device("cpu")), Weights(), seed=1)
    return (found.total + 0.5 * found.attention).item()


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in image_attention_parameters(model)}


@pytest.mark.parametrize("family", TINY)
def test_the_loss_falls_and_the_result_is_a_clear_file(family: str, tmp_path: Path) -> None:
    cache = make_samples(tmp_path / "cache", family, 4)
    settings = recipe(tmp_path, steps=12, batch_size=4, down_factor=2, optimizer="adamw", ema_decay=0.9)
    group = Group.create("cpu")
    try:
        made = trainer(group, family, cache, settings)
        before = loss(made)
        figures: list[Figures] = []
        made.run(figures.append)
        after = loss(made)
    finally:
        group.close()
    assert [each.step for each in figures] == list(range(1, 13))
    assert after < 0.95 * before
    stock = TINY[family].transformer()
    file = tmp_path / "clear_local_2_down_2.safetensors"
    tensors = {name: tuple(x.shape) for name, x in load_file(file).items()}
    require_same_tensors(with_spatial_weights(shapes(stock), 2), tensors, file)
    original = copy.deepcopy(stock)
    load_clear_weights(stock, file)
    moved = [(a - b).abs().max().item() for a, b in zip(stock.parameters(), original.parameters(), strict=True)]
    assert sum(distance > 1e-3 for distance in moved) == len(shapes(stock))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-12"]


def both(group: Group, cache: Path, output: Path) -> list[Figures]:
    return trained(group, "flux", cache, recipe(output, steps=3, batch_size=1, down_factor=2))


def test_two_ranks_do_what_one_does_with_twice_the_batch(tmp_path: Path) -> None:
    cache = make_samples(tmp_path / "cache", "flux", 6)
    two = run_ranks(both, 2, cache, tmp_path / "two")
    group = Group.create("cpu")
    try:
        one = trained(group, "flux", cache, recipe(tmp_path / "one", steps=3, batch_size=2, down_factor=2))
    finally:
        group.close()
    for figures in two:
        for mine, wanted in zip(figures, one, strict=True):
            assert (mine.total, mine.norm) == pytest.approx((wanted.total, wanted.norm), abs=1e-5)
    name = "clear_local_2_down_2.safetensors"
    results = [load_file(tmp_path / folder / name) for folder in ("two", "one")]
    for key, tensor in results[1].items():
        torch.testing.assert_close(results[0][key], tensor, atol=1e-3, rtol=1e-3)


def interrupted(group: Group, cache: Path, output: Path, when: int) -> bool:
    """Train, and fail in the update after `when`, on all ranks."""

    def told(figures: Figures) -> None:
        if figures.step == when:
            raise KeyboardInterrupt

    try:
        trainer(group, "sd3", cache, recipe(output, steps=9, batch_size=2, ema_decay=0.9)).run(told)
    except KeyboardInterrupt:
        return True
    return False


def test_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    cache = make_samples(tmp_path / "cache", "sd3", 7)
    when = int(torch.randint(5, 9, ()))
    assert run_ranks(interrupted, 2, cache, tmp_path / "broken", when) == [True, True]
    assert (tmp_path / "broken" / "checkpoint-4").is_dir()
    for folder in ("broken", "whole"):
        assert run_ranks(interrupted, 2, cache, tmp_path / folder, 0) == [False, False]
    results = [load_file(tmp_path / folder / "clear_local_2.safetensors") for folder in ("broken", "whole")]
    assert all(torch.equal(results[0][name], tensor) for name, tensor in results[1].items())
    states = [torch.load(tmp_path / folder / "checkpoint-9" / "state.rank1.pt") for folder in ("broken", "whole")]
    assert all(torch.equal(a, b) for a, b in zip(states[0]["masters"], states[1]["masters"], strict=True))
