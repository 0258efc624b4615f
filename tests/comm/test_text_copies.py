"""Copies of the text on ranks that hold them: each copy's attention is that of its holders' parts, merged."""

from typing import Any

import pytest
import torch
from torch import Tensor

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.text_copies import TextCopies
from clear_dist.comm.text_reduce import REDUCTIONS
from clear_dist.geometry import CopiedText, Rows, bands_of, cut_in_stripes, touched
from tests.ranks import run_ranks

BATCH, BAND, HEADS, DIM = 2, 6, 3, 4
"""`BAND`: text tokens of all copies of a band."""
REDUCTION = {each.word: each for each in REDUCTIONS}


def held_by(rows: int, size: int) -> tuple[Rows, ...]:
    """Bands, of 4 rows, of each rank."""
    return tuple(touched(bands_of(rows, 4), stripe) for stripe in cut_in_stripes(rows, size))


def part(rank: int, band: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A rank's attention of a band's text, and its log-sum-exp."""
    generator = torch.Generator().manual_seed(100 * rank + band)
    out, lse = (torch.randn(BATCH, BAND, HEADS, *dim, generator=generator) for dim in ((DIM,), ()))
    return out.to(dtype), 3 * lse


def reduced(group: Group, mode: str, rows: int, dtype: torch.dtype, transport: str) -> tuple[list[Tensor], Any]:
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    group = Group.create("cpu", transport=transport)
    held, counters = held_by(rows, group.size), Counters()
    mine = held[group.rank].numbers
    plan = CopiedText((len(mine) * BAND,), 0, held, group.rank)
    reduction = TextCopies(group, REDUCTION[mode], counters, plan=plan)
    outs, lses = zip(*(part(group.rank, band, dtype) for band in mine), strict=True)
    found = []
    for factor in (1, 2):
        counters.begin_step()
        into = torch.full((BATCH, plan.counts[0], HEADS, DIM), torch.nan, dtype=dtype)
        found.append(reduction.start(factor * torch.cat(outs, 1), torch.cat(lses, 1)).wait(into))
    return found, counters.as_dict()["text_bytes_reduced"]


def expected(mode: str, held: tuple[Rows, ...], band: int, dtype: torch.dtype) -> Tensor:
    parts = [part(rank, band, dtype) for rank, bands in enumerate(held) if bands.start <= band < bands.stop]
    outs, lses = (torch.stack(each).double() for each in zip(*parts, strict=True))
    weights = torch.full_like(lses, 1 / len(parts)) if mode == "average" else lses.softmax(0)
    return (weights[..., None] * outs).sum(0)


@pytest.mark.parametrize("transport", ["gloo", "host"])
@pytest.mark.parametrize("mode", ["average", "exact"])
@pytest.mark.parametrize(("size", "rows"), [(1, 9), (2, 8), (2, 9), (3, 8), (4, 9), (5, 5), (3, 24)])
def test_each_copy_has_all_parts_of_its_holders(size: int, rows: int, mode: str, transport: str) -> None:
    """Bands of one rank, of two and of more; 2 ranks of 4 rows each share none, and send nothing."""
    held = held_by(rows, size)
    for rank, (found, sent) in enumerate(run_ranks(reduced, size, mode, rows, torch.float32, transport)):
        right = torch.cat([expected(mode, held, band, torch.float32) for band in held[rank].numbers], dim=1)
        for factor, each in enumerate(found, start=1):
            torch.testing.assert_close(each.double(), factor * right, atol=1e-6, rtol=1e-6)
        shared = sum(len(bands.intersect(held[rank])) for other, bands in enumerate(held) if other != rank)
        numbers = DIM + (mode == "exact")
        assert sent == [4 * BATCH * BAND * HEADS * numbers * shared] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["average", "exact"])
def test_holders_are_equal_to_the_bit(mode: str, dtype: torch.dtype) -> None:
    """One band of 3 ranks, of which a part is mine and two have travelled."""
    (first, _), *others = run_ranks(reduced, 3, mode, 5, dtype, "gloo")
    assert first[0].dtype == dtype
    right = expected(mode, held_by(5, 3), 0, dtype)
    torch.testing.assert_close(first[0].double(), right, atol=0.01, rtol=0.01)
    assert all(torch.equal(found[turn], first[turn]) for found, _ in others for turn in range(2))
