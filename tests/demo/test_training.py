"""The demo's training: the loop that the stages share, on a toy module and a clock set by hand; a step of each stage."""

import dataclasses
import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from clear_dist.demo import WEIGHTS, pipeline, train_text, train_transformer, train_vae, training
from clear_dist.demo.grammar import random_landscape
from clear_dist.demo.train_transformer import LatentSet
from clear_dist.demo.training import Recipe, fit

RECIPE = Recipe(
    seed=1, peak_rate=0.05, warm_up=0.02, hold=0.6, weight_decay=0.01, most_gradient=1.0, average_decay=0.5,
    report_every=5,
)  # fmt: skip
SECONDS_PER_STEP = 6.0  # so 10 steps are a minute
INPUTS, WANTED = torch.eye(4), torch.arange(8.0).reshape(4, 2)


class Toy:
    """A linear layer to be fitted to WANTED, which notes what the loop asks of it."""

    def __init__(self, clock: types.SimpleNamespace, recipe: Recipe = RECIPE):
        torch.manual_seed(0)
        self.module, self.recipe, self.clock = nn.Linear(4, 2), recipe, clock
        self.draws: list[float] = []
        self.progress: list[float] = []
        self.validated: list[bool] = []
        self.interrupt_at, self.seconds_per_validation = 10**9, 0.0

    def loss(self, rng: np.random.Generator, progress: float) -> torch.Tensor:
        self.draws.append(rng.random())
        self.progress.append(progress)
        if len(self.draws) == self.interrupt_at:
            raise KeyboardInterrupt
        self.clock.now += SECONDS_PER_STEP
        return (self.module(INPUTS) - WANTED).square().mean()

    def validate(self, average: nn.Linear, last: bool) -> dict[str, float]:
        self.validated.append(last)
        self.clock.now += self.seconds_per_validation
        return {"error": (average(INPUTS) - WANTED).square().mean().item()}

    def fit(self, checkpoint: Path, minutes: float) -> nn.Linear:
        return fit(checkpoint, self.module, self.loss, self.validate, self.recipe, minutes)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """The loop's clock: it stands still but for what is added to `now`, in seconds."""
    hand = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(training, "time", types.SimpleNamespace(monotonic=lambda: hand.now))
    return hand


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tmp_path / "toy.pt"


def rows(checkpoint: Path) -> list[dict]:
    return [json.loads(line) for line in checkpoint.with_name("figures.jsonl").read_text().splitlines()]


def assert_same_state(first: Path, second: Path) -> None:
    one, two = (torch.load(path, weights_only=True) for path in (first, second))
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_fit_lowers_the_loss_and_stops_when_the_minutes_are_used(clock, checkpoint):
    toy = Toy(clock)
    average = toy.fit(checkpoint, minutes=20.0)
    figures = rows(checkpoint)
    assert len(toy.draws) == 200
    assert [row["step"] for row in figures] == list(range(5, 201, 5))
    assert figures[-1]["minutes"] == 20.0 and figures[-1]["stage"] == "toy"
    assert figures[-1]["loss"] < 0.01 * figures[0]["loss"]
    assert figures[-1]["error"] < 0.05
    assert toy.validated == [False] * 39 + [True]
    assert toy.progress == pytest.approx(np.arange(200) / 200)
    assert not average.training and not average.weight.requires_grad


def test_the_checkpoint_holds_weights_average_optimizer_step_and_minutes(clock, checkpoint):
    toy = Toy(clock)
    average = toy.fit(checkpoint, minutes=1.0)
    state = torch.load(checkpoint, weights_only=True)
    assert list(state) == ["model", "average", "optimizer", "step", "minutes"]
    assert (state["step"], state["minutes"]) == (10, 1.0)
    assert torch.equal(state["model"]["weight"], toy.module.weight)
    assert torch.equal(state["average"]["weight"], average.weight)
    assert not torch.equal(state["average"]["weight"], state["model"]["weight"])
    assert [int(values["step"]) for values in state["optimizer"]["state"].values()] == [10, 10]
    assert not list(checkpoint.parent.glob("*.part"))


def test_a_resumed_run_ends_as_an_uninterrupted_one(clock, checkpoint, tmp_path):
    Toy(clock).fit(tmp_path / "whole.pt", minutes=1.0)
    interrupted, resumed = Toy(clock), Toy(clock)
    interrupted.interrupt_at = 8
    with pytest.raises(KeyboardInterrupt):
        interrupted.fit(checkpoint, minutes=1.0)
    clock.now += 1000.0  # between the runs: not counted
    resumed.fit(checkpoint, minutes=1.0)
    assert resumed.progress == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    assert resumed.draws == list(np.random.default_rng(RECIPE.seed + 5).random(5))  # other batches than at the start
    assert_same_state(checkpoint, tmp_path / "whole.pt")


@pytest.mark.parametrize("minutes", [1.0, 0.3])
def test_with_the_minutes_used_the_average_is_only_loaded(clock, checkpoint, minutes):
    trained = Toy(clock).fit(checkpoint, minutes=1.0)
    written, figures = checkpoint.read_bytes(), rows(checkpoint)
    again = Toy(clock)
    average = again.fit(checkpoint, minutes)
    assert again.draws == [] and again.validated == []
    assert torch.equal(average.weight, trained.weight) and torch.equal(average.bias, trained.bias)
    assert checkpoint.read_bytes() == written and rows(checkpoint) == figures


def test_minutes_that_run_out_during_validation_end_with_a_checkpoint_all_the_same(clock, checkpoint):
    toy = Toy(clock)
    toy.seconds_per_validation = 60.0
    toy.fit(checkpoint, minutes=1.0)
    state = torch.load(checkpoint, weights_only=True)
    assert toy.validated == [False, True]
    assert state["step"] == 6 and state["minutes"] >= 1.0


def test_an_interrupted_write_leaves_the_former_checkpoint(clock, checkpoint, monkeypatch):
    def fail_halfway(state: dict, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    save, interrupted, resumed = torch.save, Toy(clock), Toy(clock)
    Toy(clock).fit(checkpoint, minutes=0.5)
    written = checkpoint.read_bytes()
    monkeypatch.setattr(torch, "save", fail_halfway)
    with pytest.raises(KeyboardInterrupt):
        interrupted.fit(checkpoint, minutes=1.0)
    assert checkpoint.read_bytes() == written
    monkeypatch.setattr(torch, "save", save)
    resumed.fit(checkpoint, minutes=1.0)
    assert len(resumed.draws) == 5 and torch.load(checkpoint, weights_only=True)["step"] == 10


def test_long_gradients_are_shortened_and_frozen_parameters_stay(clock, checkpoint):
    toy = Toy(clock, dataclasses.replace(RECIPE, most_gradient=1e-3))
    bias = toy.module.bias.requires_grad_(False).clone()
    toy.fit(checkpoint, minutes=0.1)
    assert toy.module.weight.grad.norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert torch.equal(toy.module.bias, bias)


def random_latents(count: int, tokens: int, **shown: float) -> LatentSet:
    """Latents of `tokens` tokens along each side."""
    rng = np.random.default_rng(tokens)
    latents = torch.from_numpy(rng.standard_normal((count, 16, 2 * tokens, 2 * tokens), dtype=np.float32)).half()
    return LatentSet(latents=latents, landscapes=[random_landscape(rng) for _ in range(count)], **shown)


def count_steps(monkeypatch: pytest.MonkeyPatch, clock: types.SimpleNamespace) -> None:
    """Each update of an average takes SECONDS_PER_STEP."""
    update = training.MovingAverage.update

    def timed(self: training.MovingAverage, module: nn.Module, step: int) -> None:
        clock.now += SECONDS_PER_STEP
        update(self, module, step)

    monkeypatch.setattr(training.MovingAverage, "update", timed)


def test_a_step_of_the_vae(clock, tmp_path, monkeypatch):
    count_steps(monkeypatch, clock)
    renders = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    pictures = dict.fromkeys(("native", "large", "held_out"), renders)
    torch.manual_seed(train_vae.RECIPE.seed)
    fresh = train_vae.build_vae().state_dict()
    vae = train_vae.train_vae(tmp_path / "vae.pt", train_vae.begin(None), pictures, minutes=0.1)
    state = torch.load(tmp_path / "vae.pt", weights_only=True)
    assert state["step"] == 1
    assert not [name for name, value in fresh.items() if torch.equal(value, state["model"][name])]
    assert np.isfinite([rows(tmp_path / "vae.pt")[-1][name] for name in ("loss", "psnr")]).all()
    encoder = {name: value.clone() for name, value in vae.encoder.state_dict().items()}
    vae.decoder.requires_grad_(True)
    again = train_vae.train_vae(tmp_path / "decoder.pt", vae, pictures, minutes=0.1)
    assert all(torch.equal(value, encoder[name]) for name, value in again.encoder.state_dict().items())
    assert not torch.equal(
        torch.load(tmp_path / "decoder.pt")["model"]["decoder.conv_in.weight"],
        state["average"]["decoder.conv_in.weight"],
    )


def test_a_step_of_the_transformer(clock, tmp_path, monkeypatch):
    count_steps(monkeypatch, clock)
    monkeypatch.setattr(train_text, "STEPS", 1)
    monkeypatch.setattr(train_text, "BATCH", 8)
    sets = [random_latents(2, 16, odds=0.5, batch=1, side=16), random_latents(1, 64, odds=0.5, batch=1, side=16)]
    with torch.compiler.set_stance("force_eager"):
        models = train_transformer.train_transformer(tmp_path, sets, {256: sets[0]}, minutes=0.1, start=None)
    assert models["transformer"].proj_out.weight.abs().max() > 0  # zero before the step
    row = rows(tmp_path / "transformer.pt")[-1]
    assert row["step"] == 1 and np.isfinite(row["held_out_256"])


def test_a_start_keeps_what_the_earlier_weights_predict():
    """Single blocks that the folder's transformer has not begin as the identity."""
    known = FluxTransformer2DModel.from_pretrained(WEIGHTS, subfolder="transformer", torch_dtype=torch.float32)
    fewer = FluxTransformer2DModel.from_config({**known.config, "num_single_layers": 3})
    fewer.load_state_dict({name: value for name, value in known.state_dict().items() if name in fewer.state_dict()})
    inputs = {
        "hidden_states": torch.randn(1, 6, 64), "timestep": torch.tensor([0.4]),
        "encoder_hidden_states": torch.randn(1, 5, 128), "pooled_projections": torch.randn(1, 128),
        "txt_ids": torch.zeros(5, 3), "img_ids": torch.randint(0, 9, (6, 3)).float(), "return_dict": False,
    }  # fmt: skip
    deeper = train_transformer.deepened(fewer)
    assert len(deeper.single_transformer_blocks) == pipeline.SINGLE_BLOCKS > 3
    with torch.no_grad():
        torch.testing.assert_close(deeper(**inputs)[0], fewer(**inputs)[0], rtol=1e-5, atol=1e-5)
