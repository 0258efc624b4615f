"""Down-sampled keys: N ranks against an oracle in an unmodified transformer."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.drawing.generation import generate
from clear_dist.engine import parts
from clear_dist.engine.extrapolation import Extrapolation
from clear_dist.engine.parts import Parts
from clear_dist.engine.pooled_keys import pool
from clear_dist.engine.striped import require_striped
from clear_dist.parallelize import parallelize
from clear_dist.weights.clear import load_clear_weights
from tests.engine.stopping import Stop, stop_in_attention
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
        settings["text_parts"] = stripes(HEIGHT, ranks, int(file.stem[-1]))
    if extrapolation is not None:
        settings["native_tokens"] = extrapolation.native_tokens
        pipe.transformer.pos_embed = Rotary(ROPE_AXES[16], theta=10_000 * extrapolation.ntk_factor, position_scale=1.0)
    pool_keys(pipe, weights, RADIUS, **settings)
    return run(pipe, steps=4 if late else 3, **SIZE)


@dataclass
class Drawn:
    """What a rank gives back."""

    latents: Tensor
    counters: dict[str, list[Any]]
    stale_bytes: int


def drawn(group: Group, cases: list[dict[str, Any]], guided: bool = True) -> list[Drawn]:
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    results = []
    for case in cases:
        pipe = make_tiny_pipeline(guidance_embeds=guided)
        arguments = {name: value for name, value in case.items() if name not in ("above", "steps")}
        parallelized = parallelize(pipe, group=group, **arguments)
        with require_striped(pipe).running(extrapolation=case.get("above")):
            latents = run(pipe, steps=case.get("steps", 3), **SIZE)
        parallelized.undo()
        results.append(Drawn(latents, parallelized.counters.as_dict(), parallelized.stale_buffer_bytes))
    return results


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_exact_on_n_ranks_is_the_oracle(folder: Path, size: int, factor: int) -> None:
    file = checkpoint(folder, factor)
    cases = [{"clear_weights": file, "above": above, **EXACT} for above in (None, ABOVE_NATIVE)]
    cases += [case | {"cut": "columns"} for case in cases if size * factor <= WIDTH]
    for results in run_ranks(drawn, size, cases):
        for result, case in zip(results, cases, strict=True):
            assert relative_error(result.latents, oracle_latents(file, case["above"])) < 1e-4
    assert relative_error(oracle_latents(file, None), oracle_latents(file, ABOVE_NATIVE)) > 1e-2


def test_pooled_keys_are_seen_in_the_oracle(folder: Path) -> None:
    """Else everything here would pass without them."""
    pipe = make_tiny_pipeline()
    load_clear_weights(pipe.transformer, checkpoint(folder, 4))
    pipe.transformer.set_attn_processor(DenseClearProcessor(HEIGHT, WIDTH, RADIUS))
    without = run(pipe, **SIZE)
    with_4, with_2 = (oracle_latents(checkpoint(folder, factor)) for factor in (4, 2))
    assert min(relative_error(without, with_4), relative_error(with_2, with_4)) > 1e-2


@pytest.mark.parametrize("size", [2, 3])
def test_average_is_equation_7_over_whole_units(folder: Path, size: int) -> None:
    """Stripes of 12 and 8 rows, and of 8, 8 and 4, where 10 and 10, or 7, 7 and 6 would be nearer to equal."""
    file = checkpoint(folder, 4)
    for (result,) in run_ranks(drawn, size, [{"clear_weights": file}]):
        assert relative_error(result.latents, oracle_latents(file, None, size)) < 1e-4
        assert relative_error(result.latents, oracle_latents(file)) > 1e-3


@pytest.mark.parametrize("size", [1, 3])
def test_layers_of_dev_go_into_schnell(folder: Path, size: int) -> None:
    """Without the guidance embedder, which is no part of what a checkpoint replaces."""
    file = checkpoint(folder, 4)
    for (result,) in run_ranks(drawn, size, [{"clear_weights": file, **EXACT}], guided=False):
        assert relative_error(result.latents, oracle_latents(file, guided=False)) < 1e-4
        assert relative_error(result.latents, oracle_latents(file)) > 1e-2


@pytest.mark.parametrize("backend", ["reference", "flex"])
def test_other_backends_are_merged_with_pooled_keys(folder: Path, backend: str) -> None:
    file = checkpoint(folder, 4)
    for (result,) in run_ranks(drawn, 2, [{"clear_weights": file, "attention_backend": backend, **EXACT}]):
        assert relative_error(result.latents, oracle_latents(file)) < 1e-4


@pytest.mark.parametrize("size", [2, 5])
def test_pooled_rows_lag_in_the_stale_schedule(folder: Path, size: int) -> None:
    """One's own are of this step, as one's own keys are."""
    file = checkpoint(folder, 4)
    cases = [
        {"clear_weights": file, "text_attention": mode, "schedule": "stale", "warmup_steps": warmup, "steps": 4}
        for mode in ("average", "exact")
        for warmup in (0, 2)
    ]
    late = [
        oracle_latents(file, None, size, average=case["text_attention"] == "average", warmup=case["warmup_steps"])
        for case in cases
    ]
    for results in run_ranks(drawn, size, cases):
        for result, expected in zip(results, late, strict=True):
            assert relative_error(result.latents, expected) < 1e-4
    assert relative_error(late[2], oracle_latents(file, None, size, average=False, warmup=4)) > 1e-3


@pytest.mark.parametrize("size", [1, 2, 5])
def test_messages_bytes_and_buffers(folder: Path, size: int) -> None:
    """Two layers of 2 heads of 16 in float32: each rank's pooled keys and values go to all others, once a layer."""
    file = checkpoint(folder, 4)
    late = {"schedule": "stale", "warmup_steps": 1}
    row_bytes = 2 * (WIDTH // 4) * 32 * 4
    heights = [len(rows) // 4 for rows in stripes(HEIGHT, size, 4)]
    plain = folder / f"clear_local_{RADIUS}.safetensors"
    make_clear_weights(make_tiny_pipeline().transformer, plain)
    cases = [{"clear_weights": file}, {"clear_weights": file, **late}, {"clear_weights": plain, **late}]
    for rank, (sync, stale, without) in enumerate(run_ranks(drawn, size, cases)):
        for result in (sync, stale):
            assert result.counters["pooled_messages_sent"] == [2 * (size - 1)] * 3
            assert result.counters["pooled_bytes_sent"] == [2 * (size - 1) * heights[rank] * row_bytes] * 3
        assert without.counters["pooled_messages_sent"] == [0] * 3
        others = 2 * (sum(heights) - heights[rank]) * row_bytes
        halos = halo_bytes(size, rank)
        assert (sync.stale_bytes, stale.stale_bytes) == (0, others + halos if size > 1 else 0)


def halo_bytes(size: int, rank: int) -> int:
    """Bytes the stale schedule keeps besides: halos of two rows, and the average of 9 text tokens."""
    mine = stripes(HEIGHT, size, 4)[rank]
    rows = [row for row in range(HEIGHT) if row not in mine and min(abs(row - own) for own in mine) < RADIUS]
    return 2 * (len(rows) * 2 * WIDTH * 32 * 4 + 9 * 32 * 4)


def refused(group: Group, file: Path) -> None:
    pipe = make_tiny_pipeline()
    parallelize(pipe, clear_weights=file, group=group)
    with pytest.raises(ValueError, match="the height in tokens must be a multiple of 4, got 18; nearest: 20"):
        run(pipe, height=18, width=8)
    with pytest.raises(ValueError, match="the width in tokens must be a multiple of 4, got 9; nearest: 8"):
        run(pipe, height=20, width=9)
    with pytest.raises(ValueError, match="8 rows of tokens can be cut for 1 to 2 ranks, got 3; nearest: 2"):
        run(pipe, height=8, width=8)
    with pytest.raises(ValueError, match="height must be a multiple of 64 pixels, got 176; nearest: 192"):
        generate(pipe, "a hill", height=176, width=192)


def test_sizes_that_are_no_whole_units_are_refused_on_all_ranks(folder: Path) -> None:
    run_ranks(refused, 3, checkpoint(folder, 4))


def test_with_full_attention_and_after_undo_nothing_is_pooled(folder: Path) -> None:
    file = checkpoint(folder, 4)
    pipe = make_tiny_pipeline()
    replaced = load_clear_weights(pipe.transformer, file)
    assert replaced.pooling is not None
    stock = run(pipe, height=9, width=7)
    for arguments in ({"window": "full", "clear_weights": file}, {"clear_weights": file}):
        parallelized = parallelize(pipe, **arguments)
        if "window" in arguments:
            assert relative_error(run(pipe, height=9, width=7), stock) < 1e-4
        else:
            assert relative_error(run(pipe, **SIZE), oracle_latents(file)) < 1e-4  # exact, on one rank
        parallelized.undo()
        assert torch.equal(run(pipe, height=9, width=7), stock)


def test_compiled_in_chunks_and_in_a_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "MOST_TOKENS", 50)
    file, prompts = checkpoint(folder, 4), ["a hill", "the sea"]
    pipe, oracle = make_tiny_pipeline(), make_tiny_pipeline()
    load_clear_weights(oracle.transformer, file)
    pool_keys(oracle, load_file(file), RADIUS, **SIZE)
    parallelized = parallelize(pipe, clear_weights=file, **EXACT)
    require_striped(pipe).parts = Parts.compiled(backend="eager", fullgraph=True)
    latents = run(pipe, prompt=prompts, **SIZE)
    parallelized.undo()
    torch._dynamo.reset()
    assert relative_error(latents, run(oracle, prompt=prompts, **SIZE)) < 1e-4


def stopped_in_the_middle(group: Group, file: Path, schedule: str) -> Tensor:
    """Stops in the second step; pooled rows of that layer were sent and are not waited for."""
    pipe = make_tiny_pipeline()
    parallelized = parallelize(pipe, clear_weights=file, schedule=schedule, warmup_steps=1, group=group, **EXACT)
    stop_in_attention(pipe, 8)
    steps = {"sync": 3, "stale": 4}[schedule]
    with pytest.raises(Stop):
        run(pipe, steps=steps, **SIZE)
    latents = run(pipe, steps=steps, **SIZE)
    parallelized.undo()
    return latents


@pytest.mark.parametrize("schedule", ["sync", "stale"])
def test_a_forward_that_broke_off_leaves_nothing_behind(folder: Path, schedule: str) -> None:
    file = checkpoint(folder, 4)
    expected = oracle_latents(file) if schedule == "sync" else oracle_latents(file, None, 2, average=False, warmup=1)
    for latents in run_ranks(stopped_in_the_middle, 2, file, schedule):
        assert relative_error(latents, expected) < 1e-4


@pytest.mark.parametrize("factor", [2, 4])
def test_pooling_in_bfloat16_rounds_as_the_official_code(factor: int) -> None:
    """Its expression, `(x.unflatten(...) * weight).sum(dim=(3, 5))`, on heads before rows."""
    x = torch.randn(2, 8, 12, 3, 16).bfloat16()
    weight = torch.rand(1, 1, 1, factor, 1, factor, 1).bfloat16()
    heads_first = x.flatten(1, 2).transpose(1, 2).unflatten(2, (8 // factor, factor, 12 // factor, factor))
    official = (heads_first * weight).sum(dim=(3, 5)).permute(0, 2, 3, 1, 4)
    ours = pool(x, weight.reshape(factor, factor))
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, official, rtol=2**-8, atol=1e-6)
