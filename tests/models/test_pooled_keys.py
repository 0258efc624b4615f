"""Down-sampled keys: N ranks against an oracle in an unmodified transformer."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.models.extrapolation import Extrapolation
from clear_dist.models.weights import load_clear_weights
from clear_dist.parallelize import parallelize, require_striped
from tests.oracle import DenseClearProcessor, Rotary
from tests.pooled_oracle import pool_keys, stripes
from tests.ranks import run_ranks
from tests.test_parallelize import relative_error, run
from tests.tiny import ROPE_AXES, make_clear_weights, make_tiny_pipeline

HEIGHT, WIDTH, RADIUS = 20, 8, 3
"""Five units of 4 rows, ten of 2; on 5 ranks with d = 2 stripes of 4 rows, wider than the halo of 2."""
SIZE = {"height": HEIGHT, "width": WIDTH}
ABOVE_NATIVE = Extrapolation(native_tokens=20, ntk_factor=10)
EXACT: dict[str, Any] = {"text_attention": "exact"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clear")
    for factor in (2, 4):
        file = folder / f"clear_local_{RADIUS}_down_{factor}.safetensors"
        make_clear_weights(make_tiny_pipeline().transformer, file, down_factor=factor)
    return folder


def checkpoint(folder: Path, factor: int) -> Path:
    return folder / f"clear_local_{RADIUS}_down_{factor}.safetensors"


@cache
def oracle_latents(
    file: Path, extrapolation: Extrapolation | None = None, ranks: int = 0, guided: bool = True, **late: Any
) -> Tensor:
    """ranks: of Eq. 7, or of the stale schedule."""
    pipe = make_tiny_pipeline(guidance_embeds=guided)
    weights = load_file(file)
    load_clear_weights(pipe.transformer, file)
    settings: dict[str, Any] = {**SIZE, **late} | ({"ranks": ranks} if late else {})
    if ranks and not late:
        settings["text_parts"] = stripes(HEIGHT, ranks, next(reversed(weights.values())).shape[3])
    if extrapolation is not None:
        settings["native_tokens"] = extrapolation.native_tokens
        pipe.transformer.pos_embed = Rotary(ROPE_AXES[16], theta=10_000 * extrapolation.ntk_factor, position_scale=1.0)
    pool_keys(pipe, weights, RADIUS, **settings)
    return run(pipe, steps=4 if late else 3, **SIZE)


def drawn(group: Group, cases: list[dict[str, Any]], guided: bool = True) -> list[tuple[Tensor, dict[str, list[Any]]]]:
    """On a rank: latents and counters of each case."""
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    results = []
    for case in cases:
        pipe = make_tiny_pipeline(guidance_embeds=guided)
        arguments = {name: value for name, value in case.items() if name not in ("above", "steps")}
        parallelized = parallelize(pipe, group=group, **arguments)
        with require_striped(pipe).running(extrapolation=case.get("above")):
            results.append((run(pipe, steps=case.get("steps", 3), **SIZE), parallelized.counters.as_dict()))
        parallelized.undo()
    return results


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_exact_on_n_ranks_is_the_oracle(folder: Path, size: int, factor: int) -> None:
    file = checkpoint(folder, factor)
    cases = [{"clear_weights": file, "above": above, **EXACT} for above in (None, ABOVE_NATIVE)]
    for results in run_ranks(drawn, size, cases):
        for (latents, _), case in zip(results, cases, strict=True):
            assert relative_error(latents, oracle_latents(file, case["above"])) < 1e-4
    assert relative_error(oracle_latents(file, None), oracle_latents(file, ABOVE_NATIVE)) > 1e-2


def test_pooled_keys_are_seen_in_the_oracle(folder: Path) -> None:
    """Else everything here would pass without them."""
    pipe = make_tiny_pipeline()
    load_clear_weights(pipe.transformer, checkpoint(folder, 4))
    pipe.transformer.set_attn_processor(DenseClearProcessor(HEIGHT, WIDTH, RADIUS))
    without = run(pipe, **SIZE)
    with_4, with_2 = (oracle_latents(checkpoint(folder, factor)) for factor in (4, 2))
    assert min(relative_error(without, with_4), relative_error(with_2, with_4)) > 1e-2
