"""A LoRA in the upper stage only, on products of 8 bits: against diffusers alone, with products emulated in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clear_dist
from clear_dist.comm.group import Group
from clear_dist.families.flux.transformer import Flux
from clear_dist.weights.quantised import to_float8, to_int8
from tests.drawing.test_cascade import relative_error
from tests.drawing.test_stage_lora import STAGES, WEIGHTS, cascade_of, expected, files, load, tiny
from tests.ranks import run_ranks
from tests.refining.drawing import Drawn, picture_of
from tests.weights import test_float8, test_int8

__all__ = ["files"]

KINDS: dict[str, Any] = {"int8": (to_int8, test_int8.Emulated), "float8": (to_float8, test_float8.Emulated)}


class Emulated(nn.Linear):
    """A linear layer, which peft takes for one, whose product a test emulates."""

    def __init__(self, stock: nn.Linear, kind: str) -> None:
        super().__init__(stock.in_features, stock.out_features)  # peft asks where its weights are
        self.product = KINDS[kind][1](stock)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


def drawn(group: Group, files: dict[str, Path], kind: str, names: tuple[str, ...]) -> Drawn:
    pipe = tiny()
    KINDS[kind][0](pipe.transformer, Flux(pipe.transformer).products)  # float8 is refused on a CPU by its option
    handle = clear_dist.parallelize(pipe, group=group, window="full")
    load(pipe, files, *names)
    found = [(each.latents, each.pixels) for each in cascade_of(pipe, group).run(STAGES)]
    handle.undo()
    return found


def emulated(kind: str) -> Any:
    pipe = tiny()
    for name in Flux(pipe.transformer).products:
        pipe.transformer.set_submodule(name, Emulated(pipe.transformer.get_submodule(name), kind))
    return pipe


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2])
def test_the_upper_stage_alone_has_it(files: dict[str, Path], size: int, kind: str) -> None:
    """A style is in both stages. Without the other LoRA the lower stage is the same to the bit."""
    found = run_ranks(drawn, size, files, kind, tuple(WEIGHTS))
    without = run_ranks(drawn, size, files, kind, ("style",))
    wanted = expected(emulated(kind), files, picture_of(found, 0))
    plain = expected(tiny(), files, picture_of(found, 0))
    for mine, other in zip(found, without, strict=True):
        for (latents, _), right, stock in zip(mine, wanted, plain, strict=True):
            assert relative_error(latents, right) < 1e-4
            assert relative_error(latents, stock) > 1e-3
        assert torch.equal(mine[0][0], other[0][0]) and torch.equal(mine[0][1], other[0][1])
        assert relative_error(other[1][0], wanted[1]) > 1e-2
