"""Halos and text of the step before, layer by layer; every halo cell tells its owner, and in which step it was sent."""

from itertools import product

import pytest
import torch
from torch import Tensor

from clear_dist.comm.clock import Clock
from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.halo_exchange import SendBuffers
from clear_dist.comm.stale_exchange import StaleHaloExchange, StaleTextReduce
from clear_dist.geometry import cut_in_stripes, plan_halos
from tests.comm.test_halo_exchange import marked, not_contiguous, owners_of_rows, rows_seen
from tests.comm.test_text_reduce import REDUCTIONS, attend, expected, inputs, keys_of
from tests.ranks import run_ranks

LAYERS, STEPS = 3, 6


def check_case(group: Group, rows: int, radius: int | None, warmup: int, sending_layers: int) -> None:
    owners = owners_of_rows(rows, group.size)
    mine = [row for row in range(rows) if owners[row] == group.rank]
    seen = rows_seen(rows, group.size, group.rank, radius)
    sides = [row for row in seen if row < mine[0]], [row for row in seen if row > mine[-1]]
    plan = plan_halos(cut_in_stripes(rows, group.size), group.rank, radius)
    clock, counters, generation = Clock(warmup_steps=warmup), Counters(), object()
    sends = SendBuffers(group, counters, layers=sending_layers)
    layers = [StaleHaloExchange(group, plan, counters, sends=sends, clock=clock) for _ in range(LAYERS)]
    for step in range(STEPS):
        clock.tick(generation, object())
        sent_at = step - 1 if step >= max(1, warmup) else step
        for number, exchange in enumerate(layers):
            key, value = (not_contiguous(marked(mine, owners, 1, 10 * step + number, torch.float32)) for _ in range(2))
            pending = exchange.start(key, value)
            assert pending.lag == (sent_at < step)
            halos = pending.wait()
            for halo, side in zip(halos, sides, strict=True):
                expected_halo = marked(side, owners, 1, 10 * sent_at + number, torch.float32)
                assert torch.equal(halo[0], expected_halo) and torch.equal(halo[1], expected_halo)
                if pending.lag:  # else the next step uses them once more
                    halo.fill_(float("nan"))
            pending.release()
            key.fill_(float("nan"))  # it was packed
            assert len(sends._leaving) <= sending_layers + 1
    for exchange in layers:
        exchange.drain()


def check_cases(group: Group, cases: list[tuple[int, int | None, int, int]], transport: str) -> None:
    torch.use_deterministic_algorithms(True)
    group = Group.create("cpu", transport=transport)
    for case in cases:
        check_case(group, *case)


@pytest.mark.parametrize("transport", ["gloo", "host"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_halo_cell_is_of_the_step_before(size: int, transport: str) -> None:
    # With 5 ranks stripes are thinner than some halos; messages of 0 to all layers on their way at a time.
    cases = list(product((size, 13), (1, 4, 8, None), (0, 2), (0, 1, 8)))
    run_ranks(check_cases, size, cases if transport == "gloo" else cases[::5], transport)


def reduce(group: Group, mode: str, factors: list[float], shifts: list[float], warmup: int) -> list[Tensor]:
    """In each step: values times a factor, and scores that are higher by a shift, on all ranks."""
    clock, generation = Clock(warmup_steps=warmup), object()
    reduction = StaleTextReduce(group, REDUCTIONS[mode], Counters(), clock=clock)
    mine = keys_of(group.rank, group.size, 41, with_text=mode == "average" or group.rank == 0)
    query, key, value = inputs(41, 1.0)
    results = []
    for factor, shift in zip(factors, shifts, strict=True):
        clock.tick(generation, object())
        out, lse = attend(query, key[:, mine], factor * value[:, mine])
        results.append(reduction.start(out.float(), lse.float() + shift).wait(torch.full_like(out.float(), torch.nan)))
    reduction.drain()
    return results


@pytest.mark.parametrize("mode", ["average", "exact"])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_text_is_of_the_step_before_and_the_same_on_all_ranks(size: int, mode: str) -> None:
    factors, right = [1.0, 2.0, 4.0, 8.0, 16.0], expected(mode, size, 41, 1.0)
    # Softmax does not see a shift: neither must the reduction, whose weights are relative to the step before.
    shifts = [0.0, 5.0, -40.0, 13.0, 60.0]
    results = run_ranks(reduce, size, mode, factors, shifts, 2)
    for mine in results:
        for step, (result, first) in enumerate(zip(mine, results[0], strict=True)):
            assert torch.equal(result, first)
            factor = factors[step - 1 if step >= 2 else step]
            torch.testing.assert_close(result.double(), factor * right, atol=1e-5 * factor, rtol=1e-5)


def test_scores_that_leap_do_no_lasting_harm() -> None:
    """Leaps beyond float32's exponents: weights are cut off, which is wrong for some steps and never NaN."""
    leaps = [0.0, 500.0, 500.0, -3000.0, *[-3000.0] * 60]
    for results in run_ranks(reduce, 2, "exact", [1.0] * len(leaps), leaps, 0):
        assert all(result.isfinite().all() for result in results)
        torch.testing.assert_close(results[-1].double(), expected("exact", 2, 41, 1.0), atol=1e-3, rtol=1e-3)
