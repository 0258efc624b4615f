"""Work and rates against figures that were worked out apart: limits of the hardware, the paper's times."""

from typing import Any

import pytest

from benchmarks.lib.counts import circle_pairs
from clear_dist.geometry import Rows
from clear_dist.plan import GPUS, LINKS, Engine
from clear_dist.plan.timing import stage_time
from clear_dist.request.hardware import named_like
from clear_dist.stages import Sampling
from tests.plan.asked import flux_request


@pytest.fixture
def seconds_per_step(engine: Engine) -> Any:
    def seconds(pixels: int, **settings: Any) -> float:
        asked = flux_request(**{"height": pixels, "width": pixels, "cascade": False, "world_size": 1} | settings)
        time = stage_time(engine, asked, 0)
        assert time is not None
        return time.step

    return seconds


def test_work_of_a_decode_at_8192_pixels(engine: Engine) -> None:
    """633 TFLOP of convolutions and 2,252 of attention."""
    asked = flux_request(world_size=1, cascade=False)
    work = engine.vae(asked, asked.parts[0][0]).operations
    assert work["convolutions"] / 1e12 == pytest.approx(633, rel=0.01)
    assert work["attention"] / 1e12 == pytest.approx(2252, rel=0.01)


@pytest.mark.parametrize(("radius", "share"), [(8, 0.171), (16, 0.419), (32, 0.568)])
def test_visited_pairs_of_the_image(radius: int, share: float, engine: Engine) -> None:
    """Tiles of 8x16 by 8x16 tokens, counted one by one at 512 x 512 tokens; ours has some more at the border."""
    asked = flux_request(window=radius, max_sequence_length=1, world_size=1, cascade=False)
    visited = engine.step(asked, asked.stages[0], asked.parts[0][0]).operations["visited"] / 57
    wanted = circle_pairs(Rows(0, 512), (512, 512), radius)
    assert 0.92 * share < wanted / visited < 1.01 * share


@pytest.mark.parametrize(("pixels", "limit", "paper"), [(2048, 0.348, 0.860), (4096, 1.37, 4.16), (8192, 5.44, 18.0)])
def test_steps_lie_between_the_limit_and_the_papers_time(
    pixels: int, limit: float, paper: float, seconds_per_step: Any
) -> None:
    """Radius 16 on an H100; the paper's are of uncompiled blocks and row-major attention."""
    assert limit < seconds_per_step(pixels) < paper


@pytest.mark.parametrize(("pixels", "limit", "paper"), [(2048, 0.6, 1.05), (4096, 5.0, 7.45), (8192, 80, 92.1)])
def test_full_attention(pixels: int, limit: float, paper: float, seconds_per_step: Any) -> None:
    assert limit < seconds_per_step(pixels, window="full", text_attention="exact") < 1.2 * paper


def test_slow_links_cost_time_and_stale_hides_more(seconds_per_step: Any) -> None:
    fast = seconds_per_step(2048, world_size=8)
    slow = {"world_size": 8, "link": LINKS["25gbe"]}
    assert seconds_per_step(2048, **slow) > seconds_per_step(2048, schedule="stale", **slow) > fast


def test_weights_in_shards_hide_behind_computing_where_there_is_enough(seconds_per_step: Any) -> None:
    """docs/models.md: enough to compute meanwhile from 4096 px on over NVLink, not at 8192 px over PCIe 4."""
    links = ((1024, "nvlink", False), (2048, "nvlink", False), (4096, "nvlink", True), (8192, "pcie4", False))
    for pixels, link, hidden in links:
        whole, sharded = (
            seconds_per_step(pixels, world_size=8, link=LINKS[link], shard_weights=shards) for shards in (False, True)
        )
        arriving = 20.7e9 / LINKS[link].bytes_per_second
        first_block = arriving / 57
        assert whole + first_block * 0.99 < sharded <= whole + arriving * 1.01
        assert (sharded - whole < 1.01 * first_block) == hidden, f"{pixels} px, {link}"


def test_text_in_shares_takes_less_time_where_it_is_much(seconds_per_step: Any) -> None:
    """At 1024 px replicated text is half of the tokens of a rank of 8."""
    replicated, shared = (seconds_per_step(1024, world_size=8, text_tokens=asked) for asked in ("replicated", "auto"))
    assert 0.5 < shared / replicated < 0.75
    assert seconds_per_step(8192, world_size=8) == seconds_per_step(8192, world_size=8, text_tokens="replicated")


def test_down_sampled_keys_take_time(seconds_per_step: Any) -> None:
    """At 8192 px nine tenths of the operations of products, at a lower rate."""
    plain, pooled = (seconds_per_step(8192, window=8, down_factor=factor) for factor in (1, 4))
    products = 3.39e15 / (0.7 * 989e12)
    assert pooled - plain == pytest.approx(0.9 * products * 0.7 / 0.55, rel=0.03)


def test_int8_weights_are_unpacked_once_a_layer(seconds_per_step: Any) -> None:
    """8.65e9 numbers, 11 bytes each, whatever the picture."""
    expected = 11 * 8.65e9 / (0.8 * 3350e9)
    for pixels in (1024, 4096):
        more = seconds_per_step(pixels, int8=True) - seconds_per_step(pixels)
        assert more == pytest.approx(expected, rel=0.01)


def test_gpus_are_known_by_their_drivers_names() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H200": "H200",
        "NVIDIA A100-SXM4-80GB": "A100-80",
        "NVIDIA A100-PCIE-40GB": "A100-40",
        "NVIDIA A100-SXM4-40GB": "A100-40",
        "NVIDIA L40S": "L40S",
        "NVIDIA GeForce RTX 4090": "RTX4090",
        "NVIDIA GeForce RTX 5090": "RTX5090",
        "NVIDIA RTX 6000 Ada Generation": "RTX6000Ada",
        "NVIDIA B200": "B200",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": "H100",
    }
    for name, kind in names.items():
        found = named_like(name)
        assert found is not None and found.name == kind, name
    assert named_like("Tesla V100-SXM2-16GB") is None
    assert named_like("NVIDIA GeForce RTX 4070") is None
    assert next(iter(GPUS)) == "h100"


@pytest.mark.parametrize(
    ("ranks", "settings", "starts"),
    [
        (1, {}, 597 + 504),
        (8, {}, 1_016 + 504 + 172),
        (1, {"compile": True}, 597 + 504),
        (1, {"int8": True}, 1_433 + 504),
        (1, {"int8": True, "compile": True}, 1_015 + 504),
        (1, {"float8": True}, 3_941 + 504),
        (1, {"float8": True, "compile": True}, 977 + 504),
    ],
)
def test_the_host_starts_what_was_counted(ranks: int, settings: Any, starts: int, engine: Engine) -> None:
    """Kernels, products and groups of messages of a step at 1024 px on GPUs that are not there, 5 us each."""
    small = {"height": 1024, "width": 1024, "cascade": False, "cuda_graphs": "off", "world_size": ranks}
    time = stage_time(engine, flux_request(**small | settings), 0)
    assert time is not None and time.host == pytest.approx(5e-6 * starts, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "are_graphs"),
    [
        ({}, True),
        ({"cuda_graphs": "off"}, False),
        ({"height": 4096, "width": 4096}, False),
        ({"height": 4096, "width": 4096, "world_size": 16}, True),
        ({"height": 2048, "width": 2048}, True),
        ({"num_images": 4, "height": 2048, "width": 2048}, False),
        ({"schedule": "stale"}, False),
        ({"shard_weights": True}, False),
        ({"shard_weights": True, "world_size": 1}, True),
        ({"hoist_modulation": True}, False),
        ({"attention_backend": "tiled"}, False),
        ({"shares_gpus": True}, False),
    ],
    ids=str,
)
def test_steps_that_are_graphs_take_the_host_next_to_nothing(settings: Any, are_graphs: bool, engine: Engine) -> None:
    small = {"height": 1024, "width": 1024, "cascade": False, "world_size": 8}
    time = stage_time(engine, flux_request(**small | settings), 0)
    assert time is not None
    assert (time.host < 1e-3) == are_graphs
    if not are_graphs:
        assert time.capturing == 0


@pytest.mark.parametrize(("passes", "fewest"), [(1, 5), (2, 4)])
def test_few_steps_are_no_graphs(passes: int, fewest: int, engine: Engine) -> None:
    """The second forward is captured, where four steps are to come."""
    small = {"height": 512, "width": 512, "cascade": False, "world_size": 8, "gpu": GPUS["b200"]}
    for steps in (fewest - 1, fewest):
        sampling = Sampling(steps=steps, true_cfg_scale=float(passes))
        time = stage_time(engine, flux_request(**small, sampling=sampling), 0)
        assert time is not None and (time.host < 1e-3) == (steps == fewest) == (time.capturing > 0)
