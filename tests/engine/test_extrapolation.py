"""Above the native size: N ranks against a stock transformer and against the dense oracle, each set up by hand."""

import math
from functools import cache
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import Tensor, nn

from clear_dist.comm.group import Group
from clear_dist.engine.extrapolation import Extrapolation, attention_scale
from clear_dist.engine.striped import require_striped
from clear_dist.parallelize import parallelize
from tests.oracle import DenseClearProcessor, Rotary
from tests.ranks import run_ranks
from tests.test_parallelize import HEIGHT, WIDTH, relative_error, run
from tests.tiny import ROPE_AXES, make_tiny_pipeline

SEED = 4303
TEXT = 9
NATIVE = Extrapolation(native_tokens=20)
PAPER = Extrapolation(native_tokens=20, ntk_factor=10)
INTERPOLATED = Extrapolation(native_tokens=20, ntk_factor=2.5, position_scale=0.4)


def striped_latents(group: Group, cases: list[tuple[dict[str, Any], Extrapolation | None]]) -> list[Tensor]:
    pipe = make_tiny_pipeline()
    results = []
    for arguments, extrapolation in cases:
        parallelized = parallelize(pipe, group=group, **arguments)
        with require_striped(pipe).running(extrapolation=extrapolation):
            results.append(run(pipe, seed=SEED))
        parallelized.undo()
    return results


@cache
def stock_latents(ntk_factor: float) -> Tensor:
    """Diffusers' own processors: rotation and scores are linear in queries, so their norms' weights scale them."""
    pipe = make_tiny_pipeline()
    transformer = pipe.transformer
    transformer.pos_embed = FluxPosEmbed(theta=10_000 * ntk_factor, axes_dim=transformer.config.axes_dims_rope)
    keys, native_keys = HEIGHT * WIDTH + TEXT, 20 + TEXT
    for name, weight in transformer.named_parameters():
        if name.endswith(("norm_q.weight", "norm_added_q.weight")):
            weight.mul_(math.sqrt(math.log(keys) / math.log(native_keys)))
    return run(pipe, seed=SEED)


@cache
def oracle_latents(radius: int, extrapolation: Extrapolation | None, ranks_of_equation_7: int = 0) -> Tensor:
    pipe = make_tiny_pipeline()
    native_tokens = None
    if extrapolation is not None:
        native_tokens = extrapolation.native_tokens
        pipe.transformer.pos_embed = Rotary(
            ROPE_AXES[16], theta=10_000 * extrapolation.ntk_factor, position_scale=extrapolation.position_scale
        )
    parts = {0: None, 2: [range(7), range(7, HEIGHT)]}[ranks_of_equation_7]
    processor = DenseClearProcessor(HEIGHT, WIDTH, radius, parts, native_tokens=native_tokens)
    pipe.transformer.set_attn_processor(processor)
    return run(pipe, seed=SEED)


@pytest.mark.parametrize("size", [1, 2])
def test_full_attention_is_a_stock_transformer_with_other_base_and_queries(size: int) -> None:
    for latents, latents_as_trained in run_ranks(striped_latents, size, [({}, PAPER), ({}, None)]):
        assert relative_error(latents, stock_latents(10)) < 1e-4
        assert relative_error(latents, stock_latents(1)) > 1e-2
        assert relative_error(latents_as_trained, run(make_tiny_pipeline(), seed=SEED)) < 1e-4


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_exact_windows_are_the_dense_oracle_s(size: int) -> None:
    cases = [(radius, how) for radius in (4, 8) for how in (NATIVE, PAPER, INTERPOLATED, None)]
    arguments = [({"window": radius, "text_attention": "exact"}, how) for radius, how in cases]
    cases.append((4, INTERPOLATED))
    arguments.append((arguments[0][0] | {"cut": "columns"}, INTERPOLATED))
    for rank_results in run_ranks(striped_latents, size, arguments):
        for latents, (radius, how) in zip(rank_results, cases, strict=True):
            assert relative_error(latents, oracle_latents(radius, how)) < 1e-4


def test_each_part_of_an_extrapolation_is_seen_in_the_oracle() -> None:
    results = [oracle_latents(4, how) for how in (None, NATIVE, PAPER, INTERPOLATED)]
    for index, latents in enumerate(results):
        for other in results[:index]:
            assert relative_error(latents, other) > 1e-2


def test_average_counts_the_keys_of_all_ranks() -> None:
    for (latents,) in run_ranks(striped_latents, 2, [({"window": 4, "text_attention": "average"}, PAPER)]):
        assert relative_error(latents, oracle_latents(4, PAPER, ranks_of_equation_7=2)) < 1e-4


@pytest.mark.parametrize("backend", ["reference", "tiled", "flex"])
def test_every_backend_takes_the_scale(backend: str) -> None:
    arguments = {"window": 4, "text_attention": "exact", "attention_backend": backend}
    for (latents,) in run_ranks(striped_latents, 2, [(arguments, PAPER)]):
        assert relative_error(latents, oracle_latents(4, PAPER)) < 1e-4


class Ids(nn.Module):
    """Keeps what the rotary embedding is given."""

    def __init__(self, stock: FluxPosEmbed) -> None:
        super().__init__()
        self.stock = stock
        self.given: list[Tensor] = []

    def forward(self, ids: Tensor) -> Any:
        self.given.append(ids)
        return self.stock(ids)


def ids_seen(group: Group) -> tuple[Tensor, tuple[int, int]]:
    pipe = make_tiny_pipeline()
    parallelized = parallelize(pipe, window=4, text_tokens="replicated", group=group)
    with require_striped(pipe).running(extrapolation=INTERPOLATED):
        spy = Ids(pipe.transformer.pos_embed)
        pipe.transformer.pos_embed = spy
        run(pipe, steps=1)
    return spy.given[0], parallelized.stripes[group.rank]


def test_the_transformer_sees_scaled_positions() -> None:
    for ids, (start, stop) in run_ranks(ids_seen, 2):
        expected = [(0.0, 0.4 * y, 0.4 * x) for y in range(start, stop) for x in range(WIDTH)]
        torch.testing.assert_close(ids, torch.tensor([(0.0, 0.0, 0.0)] * TEXT + expected))


def other_on_rank_1(group: Group, what: str) -> None:
    pipe = make_tiny_pipeline()
    parallelize(pipe, window=4, group=group)
    mine = {"scale": INTERPOLATED, "none": None}[what] if group.rank == 1 else PAPER
    with (
        require_striped(pipe).running(extrapolation=mine),
        pytest.raises(ValueError, match=r"same extrapolation, got Extrapolation\(native_tokens=20"),
    ):
        run(pipe)


@pytest.mark.parametrize("what", ["scale", "none"])
def test_ranks_with_different_extrapolations_are_told(what: str) -> None:
    run_ranks(other_on_rank_1, 2, what)


def test_the_scale_at_the_native_size_is_the_usual_one() -> None:
    assert attention_scale(None, head_dim=64, text_tokens=5, image_tokens=7) is None
    native = Extrapolation(native_tokens=64 * 64)
    scale = attention_scale(native, head_dim=128, text_tokens=512, image_tokens=64 * 64)
    assert scale == pytest.approx(128**-0.5)
    scale = attention_scale(native, head_dim=128, text_tokens=512, image_tokens=512 * 512)
    assert scale == pytest.approx(128**-0.5 * 1.21626, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"native_tokens": 1}, "native_tokens must be at least 2, got 1"),
        ({"native_tokens": 9, "ntk_factor": 0.0}, "ntk_factor must be above 0"),
        ({"native_tokens": 9, "position_scale": math.nan}, "position_scale must be above 0 and finite, got nan"),
        ({"native_tokens": 9, "ntk_factor": math.inf}, "ntk_factor must be above 0 and finite, got inf"),
    ],
)
def test_impossible_extrapolations_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Extrapolation(**arguments)
