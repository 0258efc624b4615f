"""Step caches on stripes: against a plain implementation on unmodified pipelines, which counts and decides apart."""

from functools import cache
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clear_dist import parallelize
from clear_dist.comm.clock import Clock
from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.engine.step_cache import FirstBlock
from clear_dist.engine.striped import require_striped
from clear_dist.options import Options, Refusal
from clear_dist.request.flags import UpscaleFlags
from tests.engine.test_guidance import HEIGHT, IN_TWO_PASSES, MODELS, WIDTH, draw
from tests.plain_caches import Plain, PlainFirstBlock, PlainTaylor
from tests.ranks import run_ranks
from tests.test_parallelize import relative_error

STEPS, TOKENS = 9, HEIGHT // 16 * WIDTH // 16
KINDS = ("first-block", "taylor")


@cache
def threshold(name: str) -> float:
    """A threshold that some steps stay below: more than the median change of a run without skipping."""
    pipe = MODELS[name][0]()
    found = PlainFirstBlock(pipe.transformer, 0.0, image_of(name), **counts(name))
    draw(name, pipe, num_inference_steps=STEPS)
    return round(min(1.1 * median(found.changes), 2.0), 3)


def image_of(name: str) -> slice:
    """Where image tokens stand in a block's output; diffusers' Z-Image has its padding and the caption behind them."""
    return slice(TOKENS) if name == "z_image" else slice(-TOKENS, None)


def counts(name: str) -> dict[str, int]:
    return {"steps": STEPS, "passes": 2 if name in IN_TWO_PASSES else 1}


def caches(name: str) -> dict[str, str]:
    return {"first-block": f"first-block:{threshold(name)}", "taylor": "taylor:2"}


@cache
def plain(name: str, kind: str) -> tuple[Tensor, Plain | None]:
    pipe = MODELS[name][0]()
    found: Plain | None = None
    if kind == "first-block":
        found = PlainFirstBlock(pipe.transformer, threshold(name), image_of(name), **counts(name))
    elif kind == "taylor":
        found = PlainTaylor(pipe.transformer, 2, **counts(name))
    return draw(name, pipe, num_inference_steps=STEPS), found


def skipped(name: str, kind: str, *, turns: tuple[int, ...] = (0, 1)) -> list[int]:
    """Steps in which the plain cache leaves out a pass, of those that are asked for."""
    found = plain(name, kind)[1]
    assert found is not None
    return sorted({step for step, turn in found.skipped if turn in turns})


def everything(group: Group, given: dict[str, dict[str, str]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, (make, _) in MODELS.items():
        pipe = make()
        for kind, chosen in given[name].items():
            for halves in (1, 2)[: 1 + (group.size == 2)]:
                handle = parallelize(pipe, group=group, cache=chosen, cut="rows", guidance_ranks=halves)
                latents = draw(name, pipe, num_inference_steps=STEPS)
                of_case = found.setdefault(f"{name} {kind} {halves}", {})
                of_case |= {"latents": latents, "skipped": handle.skipped_steps, "comm": handle.counters.as_dict()}
                handle.undo()
    return found


@pytest.fixture(scope="module")
def found() -> dict[int, list[dict[str, dict[str, Any]]]]:
    given = {name: caches(name) for name in MODELS}
    return {size: run_ranks(everything, size, given) for size in (1, 2, 3)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_any_number_of_ranks_skips_what_a_plain_cache_does(name: str, kind: str, found: dict[int, list[Any]]) -> None:
    expected, steps = plain(name, kind)[0], skipped(name, kind)
    assert steps and relative_error(expected, plain(name, "none")[0]) > 1e-3
    if isinstance(apart := plain(name, kind)[1], PlainFirstBlock):
        assert 0 < len(apart.continued) < len(apart.skipped)  # some are held, some continued
    for size, ranks in found.items():
        for rank in (rank[f"{name} {kind} 1"] for rank in ranks):
            assert rank["skipped"] == steps, size
            assert relative_error(rank["latents"], expected) < 1e-4, size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_each_half_decides_for_its_pass(name: str, kind: str, found: dict[int, list[Any]]) -> None:
    for half, rank in enumerate(rank[f"{name} {kind} 2"] for rank in found[2]):
        assert rank["skipped"] == skipped(name, kind, turns=(half,) if name in IN_TWO_PASSES else (0,))
        assert relative_error(rank["latents"], plain(name, kind)[0]) < 1e-4


def test_a_skipped_step_sends_the_first_block_s_halos(found: dict[int, list[Any]]) -> None:
    """Z-Image in one pass: halos of its refiner and of two blocks are as large, and only the last is left out."""
    by_block, by_line = (found[3][1][f"z_image {kind} 1"] for kind in KINDS)
    whole = by_block["comm"]["halo_bytes_sent"][0]
    assert whole > 0
    for step in range(STEPS):
        here = by_block["comm"]["halo_bytes_sent"][step]
        assert here == (whole * 2 // 3 if step in by_block["skipped"] else whole), step
        assert by_line["comm"]["halo_bytes_sent"][step] == (0 if step in by_line["skipped"] else whole), step
        assert by_block["comm"]["other_bytes"][step] == 16 * (0 < step < STEPS - 2), step  # two sums
        assert by_line["comm"]["other_bytes"][step] == 0, step


def test_nothing_is_skipped_with_threshold_0() -> None:
    pipe = MODELS["flux"][0]()
    latents: dict[str | None, Tensor] = {}
    for given in (None, "first-block:0"):
        handle = parallelize(pipe, cache=given)
        latents[given] = draw("flux", pipe)
        assert handle.skipped_steps == []
        handle.undo()
        assert type(pipe.transformer.transformer_blocks) is nn.ModuleList
    assert torch.equal(latents[None], latents["first-block:0"])


def lagging(group: Group, given: str) -> tuple[Tensor, list[int], dict[int, list[bool]]]:
    """Latents, steps that were skipped, and whether halos of the first and the second block lag in each step."""
    pipe = MODELS["z_image"][0]()
    handle = parallelize(pipe, group=group, cache=given, schedule="stale", warmup_steps=1)
    striped = require_striped(pipe)
    lags: dict[int, list[bool]] = {}

    def look(layer: int) -> None:
        here = striped.running_cut.exchanges.of(0, layer, striped.text_plan).halos.lags
        lags.setdefault(len(lags) - (layer > 0), []).append(here)

    for layer, block in enumerate(pipe.transformer.layers):
        block.register_forward_pre_hook(lambda *_, layer=layer: look(layer))
    return draw("z_image", pipe, num_inference_steps=STEPS), handle.skipped_steps, lags


def test_halos_lag_where_the_step_before_was_computed() -> None:
    ranks = run_ranks(lagging, 2, caches("z_image")["first-block"])
    for latents, skipped, lags in ranks:
        assert skipped and torch.equal(latents, ranks[0][0]) and skipped == ranks[0][1]
        computed = [step for step in range(STEPS) if step not in skipped]
        assert [here[0] for here in lags.values()] == [step > 0 for step in range(STEPS)]
        assert {step: here[1] for step, here in lags.items() if here[1:]} == {
            step: step > 0 and step - 1 not in skipped for step in computed
        }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("first-block:-0.1", "^--cache first-block must be a number from 0 to 2, got -0.1; nearest: 0$"),
        ("first-block:nan", "^--cache first-block must be a number from 0 to 2, got nan; nearest: 0$"),
        ("first-block", "^--cache needs a number behind first-block:, got ''; nearest: first-block:0.1$"),
        ("first-block:inf", "^--cache first-block must be a number from 0 to 2, got inf; nearest: 2$"),
        ("taylor:1", "^--cache taylor must be from 2 to 10, got 1; nearest: 2$"),
        ("taylor:2.5", "^--cache needs a whole number behind taylor:, got '2.5'; nearest: taylor:2$"),
        ("tailor:2", "^--cache must be one of first-block, taylor, got 'tailor'; nearest: taylor$"),
    ],
)
def test_wrong_caches_are_refused(given: str, message: str) -> None:
    with pytest.raises(Refusal, match=message):
        Options(cache=given)


def test_what_cannot_be_cached_is_refused() -> None:
    with pytest.raises(Refusal, match=r"^--schedule must be sync with --cache taylor .*, got stale; nearest: sync$"):
        Options(cache="taylor:3", schedule="stale")
    with pytest.raises(Refusal, match=r"^either --controlnet or --cache can be given, got both; leave one out$"):
        UpscaleFlags(images=["a.png"], controlnet="union-pro", cache="taylor:3")
    with pytest.raises(ValueError, match=r"^cache first-block knows no blocks of Linear; nearest: cache='taylor:3'$"):
        FirstBlock(nn.Linear(1, 1), 0.1, clock=Clock(warmup_steps=0), counters=Counters())
