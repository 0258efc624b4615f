"""Both reductions against softmax in float64 over the very keys that they stand for."""

import pytest
import torch
from torch import Tensor

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.text_reduce import Average, Exact, Reduction, TextReduce
from tests.ranks import run_ranks

BATCH, TEXT, HEADS, DIM = 2, 5, 3, 8
REDUCTIONS: dict[str, Reduction] = {"average": Average(), "exact": Exact()}


def inputs(image: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, T, N, D], keys and values [B, T + image, N, D], the text's first, in float64."""
    generator = torch.Generator().manual_seed(image)
    query, key, value = (
        torch.randn(BATCH, length, HEADS, DIM, generator=generator, dtype=torch.float64)
        for length in (TEXT, TEXT + image, TEXT + image)
    )
    return query * spread, key, value


def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Output [B, T, N, D] and log-sum-exp [B, T, N]."""
    scores = torch.einsum("btnd,bsnd->btns", query, key) / DIM**0.5
    return torch.einsum("btns,bsnd->btnd", scores.softmax(-1), value), scores.logsumexp(-1)


def keys_of(rank: int, size: int, image: int, with_text: bool) -> list[int]:
    """Every size-th image token stands for a stripe: which keys a rank holds makes no difference here."""
    return list(range(TEXT if with_text else 0)) + list(range(TEXT + rank, TEXT + image, size))


def reduce(
    group: Group, mode: str, image: int, dtype: torch.dtype, spread: float, transport: str
) -> tuple[list[Tensor], dict[str, list]]:
    group = Group.create("cpu", transport=transport)
    counters = Counters()
    reduction = TextReduce(group, REDUCTIONS[mode], counters)
    mine = keys_of(group.rank, group.size, image, with_text=mode == "average" or group.rank == 0)
    query, key, value = inputs(image, spread)
    results = []
    for factor in (1, 2):
        counters.begin_step()
        out, lse = attend(query, key[:, mine], factor * value[:, mine])
        into = torch.full_like(out.to(dtype), torch.nan)
        results.append(reduction.start(out.to(dtype), lse.float()).wait(into))
    return results, counters.as_dict()


def expected(mode: str, size: int, image: int, spread: float) -> Tensor:
    query, key, value = inputs(image, spread)
    if mode == "exact":
        return attend(query, key, value)[0]
    # Eq. 7: the mean over ranks of softmax over the text keys and the keys of one stripe.
    parts = [keys_of(rank, size, image, with_text=True) for rank in range(size)]
    return torch.stack([attend(query, key[:, part], value[:, part])[0] for part in parts]).mean(0)


def test_text_keys_count_in_each_mean_and_once_in_a_sum() -> None:
    assert [Average().counts_text_keys(rank) for rank in range(3)] == [True, True, True]
    assert [Exact().counts_text_keys(rank) for rank in range(3)] == [True, False, False]


@pytest.mark.parametrize("transport", ["gloo", "host"])
@pytest.mark.parametrize("mode", ["average", "exact"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_the_reduction_is_the_softmax_it_stands_for(size: int, mode: str, transport: str) -> None:
    right = expected(mode, size, 41, 1.0)
    for results, _ in run_ranks(reduce, size, mode, 41, torch.float32, 1.0, transport):
        for factor, result in zip((1, 2), results, strict=True):
            torch.testing.assert_close(result.double(), factor * right, atol=1e-6, rtol=1e-6)


def test_exact_survives_scores_that_overflow_an_exponential() -> None:
    for results, _ in run_ranks(reduce, 3, "exact", 41, torch.float32, 300.0, "gloo"):
        torch.testing.assert_close(results[0].double(), expected("exact", 3, 41, 300.0), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("mode", ["average", "exact"])
def test_bfloat16_stays_bfloat16(mode: str) -> None:
    answers = [results[0] for results, _ in run_ranks(reduce, 3, mode, 41, torch.bfloat16, 1.0, "gloo")]
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    assert answers[0].dtype == torch.bfloat16
    torch.testing.assert_close(answers[0].double(), expected(mode, 3, 41, 1.0), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("mode", ["average", "exact"])
def test_its_volume_does_not_depend_on_the_image(mode: str) -> None:
    elements = BATCH * TEXT * HEADS
    # average: the output in its own dtype; exact: the log-sum-exp, then output and weight, in float32.
    volume = elements * DIM * 2 if mode == "average" else elements * 4 * (1 + DIM + 1)
    for image in (16, 160):
        for _, counted in run_ranks(reduce, 2, mode, image, torch.bfloat16, 1.0, "gloo"):
            assert counted["text_bytes_reduced"] == [volume, volume]
            assert counted["halo_bytes_sent"] == counted["join_bytes"] == [0, 0]


def misuse(group: Group) -> None:
    reduction = TextReduce(group, Average(), Counters())
    pending = reduction.start(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3))
    with pytest.raises(AssertionError, match="not waited for"):
        reduction.start(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3))
    pending.wait(torch.empty(1, 2, 3, 4))
    with pytest.raises(AssertionError, match="already"):
        pending.wait(torch.empty(1, 2, 3, 4))


def test_starting_twice_and_waiting_twice_are_refused() -> None:
    run_ranks(misuse, 2)
