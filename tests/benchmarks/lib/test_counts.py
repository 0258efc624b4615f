"""The benchmarks' counts, against limits.md, the paper's figures, counting one by one, and the engine's own counters."""

from itertools import product

import pytest
import torch

from benchmarks.lib.counts import (
    FLUX,
    Model,
    Part,
    attended_pairs,
    attention_work,
    circle_pairs,
    gathering_over_halos,
    linear_work,
    middle_part,
    traffic,
)
from clear_dist import parallelize
from clear_dist.comm.group import Group
from clear_dist.geometry import Rows
from tests.ranks import run_ranks
from tests.tiny import make_tiny_pipeline

PETA = 1e15
TINY = Model(double_blocks=1, single_blocks=1, heads=2, head_dim=16, text_tokens=7, itemsize=4)


@pytest.mark.parametrize(
    ("side", "linear", "full", "window_8", "window_16", "window_32"),
    [
        (1024, 0.060, 0.015, 0.004, 0.005, 0.009),
        (2048, 0.218, 0.200, 0.014, 0.020, 0.041),
        (4096, 0.853, 3.06, 0.056, 0.082, 0.179),
        (8192, 3.39, 48.3, 0.223, 0.330, 0.746),
        (16384, 13.5, 771, 0.89, 1.33, 3.04),
    ],
)
def test_work_of_a_step_of_flux(side, linear, full, window_8, window_16, window_32):
    whole = {window: middle_part(side, 1, window) for window in ("full", 8, 16, 32)}
    assert linear_work(FLUX, whole["full"]) / PETA == pytest.approx(linear, rel=0.01)
    assert attention_work(FLUX, whole["full"]) / PETA == pytest.approx(full, rel=0.02)
    for window, expected in ((8, window_8), (16, window_16), (32, window_32)):
        assert attention_work(FLUX, whole[window]) / PETA == pytest.approx(expected, rel=0.01, abs=0.0005)


@pytest.mark.parametrize(
    ("side", "window", "gflop"),
    [
        (1024, "full", 260.9),
        (1024, 8, 63.5),
        (1024, 32, 154.1),
        (2048, "full", 3507.9),
        (2048, 16, 352.6),
        (4096, 32, 3141.7),
    ],
)
def test_work_of_a_layer_is_the_papers(side, window, gflop):
    assert attention_work(FLUX, middle_part(side, 1, window)) / FLUX.layers / 1e9 == pytest.approx(gflop, rel=0.001)


@pytest.mark.parametrize("radius", [1, 2, 4, 9])
@pytest.mark.parametrize("queries", [Rows(0, 7), Rows(2, 5), Rows(6, 7)])
def test_pairs_one_by_one(radius, queries):
    height, width = 7, 5
    found = sum(
        (y - other_y) ** 2 + (x - other_x) ** 2 < radius**2
        for y, x in product(range(queries.start, queries.stop), range(width))
        for other_y, other_x in product(range(height), range(width))
    )
    assert circle_pairs(queries, (height, width), radius) == found


@pytest.mark.parametrize("window", [8, "full"])
def test_shares_add_up_but_for_the_text(window):
    parts = [Part(grid=(13, 6), ranks=3, rank=rank, window=window) for rank in range(3)]
    whole = Part(grid=(13, 6), ranks=1, rank=0, window=window)
    repeated = 2 * 5 * (5 if window != "full" else 5 + 13 * 6)  # text queries, on the two other ranks
    found = sum(attended_pairs(5, part, own_text=5) for part in parts)
    assert found == attended_pairs(5, whole, own_text=5) + repeated


def test_halos_are_a_fourteenth_of_gathering():
    assert gathering_over_halos(FLUX, 8192, 8, 16) >= 14


def drawn(group: Group, window: int | str, schedule: str) -> dict:
    pipe = make_tiny_pipeline(heads=TINY.heads, head_dim=TINY.head_dim)
    pipe.set_progress_bar_config(disable=True)
    handle = parallelize(pipe, window=window, cut="rows", schedule=schedule, warmup_steps=0, group=group)
    embeddings = {"prompt_embeds": torch.ones(1, TINY.text_tokens, 24), "pooled_prompt_embeds": torch.ones(1, 16)}
    generator = torch.Generator().manual_seed(0)
    pipe(**embeddings, height=208, width=96, num_inference_steps=3, generator=generator, output_type="latent")
    return {name: amounts[-1] for name, amounts in handle.counters.as_dict().items()}


@pytest.mark.parametrize("window", [4, "full"])
@pytest.mark.parametrize("schedule", ["sync", "stale"])
def test_bytes_are_those_that_the_engine_counts(window, schedule):
    for rank, counted in enumerate(run_ranks(drawn, 3, window, schedule)):
        expected = traffic(TINY, Part(grid=(13, 6), ranks=3, rank=rank, window=window), schedule)
        assert counted["halo_bytes_sent"] == expected.halos_sent
        assert counted["text_bytes_gathered"] == expected.text_gathered
        assert counted["text_bytes_reduced"] == expected.text_reduced
        assert counted["join_bytes"] == expected.join
