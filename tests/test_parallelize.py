"""N ranks against one, against the unmodified pipeline, and against an oracle written apart from the engine."""

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.options import Options
from clear_dist.parallelize import interrupt, parallelize
from tests.oracle import DenseClearProcessor
from tests.ranks import run_ranks
from tests.tiny import make_tiny_pipeline

HEIGHT, WIDTH = 13, 11
"""In tokens: rows that 2, 3, 5 and 8 ranks don't divide; with 8, stripes of one and two rows are thinner than a halo."""
RADII = (1, 4, 8, 1000)


def run(
    pipe: FluxPipeline, *, height: int = HEIGHT, width: int = WIDTH, seed: int = 7, steps: int = 3, **arguments: Any
) -> Tensor:
    """Latents after the last step."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        **({"prompt": "a lighthouse at dusk"} | arguments),
        height=16 * height,
        width=16 * width,
        num_inference_steps=steps,
        max_sequence_length=9,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).images


def striped_latents(group: Group, cases: list[dict[str, Any]]) -> list[tuple[Tensor, list[dict[str, Any]]]]:
    """On a rank: latents and counters of each case, all with one pipeline."""
    pipe = make_tiny_pipeline()
    results = []
    for case in cases:
        parallelized = parallelize(pipe, group=group, **case)
        results.append((run(pipe), parallelized.counters.as_dict()))
        parallelized.undo()
    return results


@cache
def stock_latents() -> Tensor:
    return run(make_tiny_pipeline())


@cache
def oracle_latents(radius: int, ranks: int | None) -> Tensor:
    """The unmodified transformer with a dense processor; `ranks`: those of Eq. 7, None: exact text attention."""
    pipe = make_tiny_pipeline()
    parts = None
    if ranks is not None:
        tall, rest = divmod(HEIGHT, ranks)
        heights = [tall + 1] * rest + [tall] * (ranks - rest)
        parts = [range(sum(heights[:rank]), sum(heights[: rank + 1])) for rank in range(ranks)]
    pipe.transformer.set_attn_processor(DenseClearProcessor(HEIGHT, WIDTH, radius, parts))
    return run(pipe)


def relative_error(x: Tensor, expected: Tensor) -> float:
    return float((x - expected).norm() / expected.norm())


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_exact_does_not_depend_on_the_number_of_ranks(size: int) -> None:
    cases = [
        {"window": radius, "text_attention": "exact", "cut": cut} for radius in RADII for cut in ("auto", "columns")
    ]
    for rank_results in run_ranks(striped_latents, size, cases):
        for case, (latents, _) in zip(cases, rank_results, strict=True):
            assert relative_error(latents, oracle_latents(case["window"], None)) < 1e-4


@pytest.mark.parametrize("size", [1, 2, 5])
def test_average_is_equation_7(size: int) -> None:
    cases = [{"window": radius} for radius in RADII]
    for rank_results in run_ranks(striped_latents, size, cases):
        for radius, (latents, _) in zip(RADII, rank_results, strict=True):
            assert relative_error(latents, oracle_latents(radius, size)) < 1e-4
            assert size == 1 or relative_error(latents, oracle_latents(radius, None)) > 1e-3


@pytest.mark.parametrize("size", [1, 2, 3])
def test_full_window_is_the_stock_pipeline(size: int) -> None:
    for rank_results in run_ranks(striped_latents, size, [{"window": "full"}, {}]):
        for latents, _ in rank_results:
            assert relative_error(latents, stock_latents()) < 1e-4


@pytest.mark.parametrize("backend", ["reference", "tiled", "flex"])
def test_backends_can_be_forced(backend: str) -> None:
    case = {"window": 4, "text_attention": "exact", "attention_backend": backend}
    for ((latents, _),) in run_ranks(striped_latents, 2, [case]):
        assert relative_error(latents, oracle_latents(4, None)) < 1e-4


@pytest.mark.parametrize("size", [2, 5])
def test_bytes_and_messages_of_a_step(size: int) -> None:
    """Two layers of 2 heads of 16 in float32; expected from the definition of a halo, not from the plan."""
    radius, cases = 4, {"rows": (HEIGHT, WIDTH), "columns": (WIDTH, HEIGHT)}
    ranks = run_ranks(striped_latents, size, [{"window": radius, "cut": cut} for cut in cases])
    for (along, across), counters in zip(cases.values(), zip(*ranks, strict=True), strict=True):
        short, rest = divmod(along, size)
        owners = [rank for rank in range(size) for _ in range(short + (rank < rest))]
        for rank, (_, counted) in enumerate(counters):
            lent = {
                (peer, line)
                for line in range(along)
                for other, peer in enumerate(owners)
                if owners[line] == rank and peer != rank and abs(line - other) <= radius - 1
            }
            assert counted["halo_bytes_sent"] == [2 * (2 * len(lent) * across * 32 * 4)] * 3
            assert counted["halo_messages_sent"] == [2 * len({peer for peer, _ in lent})] * 3


def everything_at_once(group: Group) -> list[Tensor]:
    """Guidance with a negative prompt, a batch with a generator each, another size, image-to-image: one pipeline."""
    pipe = make_tiny_pipeline()
    parallelized = None
    if group.size > 1:
        parallelized = parallelize(pipe, window="full", group=group)
    guided = run(pipe, negative_prompt="fog", true_cfg_scale=2.0, num_images_per_prompt=2)
    batch = run(pipe, prompt=["a hill", "the sea"], height=11, width=13)
    again = run(pipe, height=11, width=13, seed=8)
    picture = torch.rand(1, 3, 16 * 9, 16 * 6, generator=torch.Generator().manual_seed(0))
    from_picture = FluxImg2ImgPipeline.from_pipe(pipe)
    from_picture.set_progress_bar_config(disable=True)
    edited = from_picture(
        prompt="a hill",
        image=picture,
        height=16 * 9,
        width=16 * 6,
        strength=0.7,
        num_inference_steps=4,
        max_sequence_length=5,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images
    if parallelized is not None:
        parallelized.undo()
    return [guided, batch, again, edited, run(pipe)]


def test_stock_features_on_one_pipeline_object() -> None:
    """`full` on 3 ranks against the unmodified pipelines (one rank leaves the pipeline as it is); undone at the end."""
    expected = run_ranks(everything_at_once, 1)[0]
    for results in run_ranks(everything_at_once, 3):
        for latents, stock in zip(results, expected, strict=True):
            assert relative_error(latents, stock) < 1e-4


def stock_after_undo(group: Group) -> bool:
    pipe = make_tiny_pipeline()
    before = dict(pipe.transformer.attn_processors)
    parallelized = parallelize(pipe, window=4, group=group)
    run(pipe)
    parallelized.undo()
    parallelized.undo()  # to no effect
    return pipe.transformer.attn_processors == before and torch.equal(run(pipe), run(make_tiny_pipeline()))


def threads_and_noise(group: Group) -> None:
    torch.set_num_threads(1 + group.rank)
    pipe = make_tiny_pipeline()
    parallelize(pipe, window=4, group=group)
    # So many tokens that PyTorch adds them up in parallel, in another order on each rank.
    run(pipe, height=64, width=40)


def test_equal_noise_is_equal_whatever_the_number_of_threads() -> None:
    run_ranks(threads_and_noise, 2)


UNEQUAL: dict[str, dict[str, Any]] = {
    "guidance": {"negative_prompt": "fog", "true_cfg_scale": 3.0},
    "batch": {"prompt": ["a hill", "a lake"]},
    "prompt": {"prompt": "a hill"},
    "steps": {"steps": 4},
}


def unequal_arguments(group: Group, what: str) -> None:
    pipe = make_tiny_pipeline()
    parallelize(pipe, window=4, group=group)
    with pytest.raises(ValueError, match="every rank must"):
        run(pipe, **(UNEQUAL[what] if group.rank == 1 else {}))


@pytest.mark.parametrize("what", UNEQUAL)
def test_ranks_with_different_arguments_are_told_and_do_not_hang(what: str) -> None:
    run_ranks(unequal_arguments, 2, what)


def unequal_settings(group: Group) -> None:
    with pytest.raises(ValueError, match="window must be the same on all ranks, got 4, 5"):
        parallelize(make_tiny_pipeline(), window=4 + group.rank, group=group)
    with pytest.raises(ValueError, match="schedule must be the same on all ranks, got sync, stale"):
        parallelize(make_tiny_pipeline(), window=4, schedule=("sync", "stale")[group.rank], group=group)
    with pytest.raises(ValueError, match="warmup_steps must be the same on all ranks, got 2, 3"):
        parallelize(make_tiny_pipeline(), window=4, schedule="stale", warmup_steps=2 + group.rank, group=group)


def test_ranks_with_different_settings_are_told() -> None:
    run_ranks(unequal_settings, 2)


def offloaded_on_one_rank(group: Group) -> bool:
    parallelize(make_tiny_pipeline(), window=4, offload=group.rank == 0, group=group)
    return True


def test_offloading_concerns_a_rank_alone() -> None:
    assert run_ranks(offloaded_on_one_rank, 2) == [True, True]


def test_options_are_taken_as_a_record_or_by_name() -> None:
    record = Options(window=4, text_attention="exact")
    for arguments in ((record,), (Options(window=9), {"window": 4, "text_attention": "exact"})):
        pipe = make_tiny_pipeline()
        handle = parallelize(pipe, arguments[0], **dict(*arguments[1:]))
        assert (handle.window, handle.text_attention) == (4, "exact")
        handle.undo()


def test_undo_restores_the_stock_pipeline() -> None:
    assert all(run_ranks(stock_after_undo, 2))


def different_noise(group: Group) -> str:
    pipe = make_tiny_pipeline()
    parallelize(pipe, window=4, group=group)
    with pytest.raises(ValueError, match=r"generator=torch\.Generator") as error:
        run(pipe, seed=group.rank)
    return str(error.value)


def test_ranks_with_different_noise_are_told_to_seed_generators() -> None:
    assert len(set(run_ranks(different_noise, 3))) == 1


def interrupted_on_rank_1(group: Group) -> int:
    pipe = make_tiny_pipeline()
    parallelize(pipe, window=4, group=group)
    steps = []

    def stop_after_two(pipe: FluxPipeline, step: int, _: Any, __: Any) -> dict[str, Any]:
        steps.append(step)
        interrupt(pipe, when=group.rank == 1 and step == 1)
        return {}

    run(pipe, callback_on_step_end=stop_after_two)
    return len(steps)


def test_an_interrupt_on_one_rank_stops_all() -> None:
    assert run_ranks(interrupted_on_rank_1, 3) == [2, 2, 2]


def many_ranks_few_rows(group: Group) -> None:
    pipe = make_tiny_pipeline()
    parallelize(pipe, window=4, group=group, cut="rows")
    with pytest.raises(ValueError, match="2 rows of tokens can be cut for 1 to 2 ranks, got 3"):
        run(pipe, height=2)


def test_more_ranks_than_rows_is_refused_on_all() -> None:
    run_ranks(many_ranks_few_rows, 3)


def alone() -> tuple[FluxPipeline, Any]:
    pipe = make_tiny_pipeline()
    return pipe, parallelize(pipe, window=4, text_attention="exact")


def test_a_process_alone_needs_no_launcher() -> None:
    pipe, parallelized = alone()
    try:
        assert relative_error(run(pipe), oracle_latents(4, None)) < 1e-4
        assert parallelized.grid == (HEIGHT, WIDTH)
        assert parallelized.stripes == [(0, HEIGHT)]
        with pytest.raises(ValueError, match="parallelized already"):
            parallelize(pipe, window=4)
        pipe.transformer.transformer_blocks[0].attn.set_processor(DenseClearProcessor(HEIGHT, WIDTH, 4))
        with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn.*DenseClearProcessor"):
            run(pipe)
    finally:
        parallelized.undo()
