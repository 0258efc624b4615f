"""Merging by the kernels, against float64; `test_merging.py` runs this file in Triton's interpreter.

Suffixes: B batch, R rows, W columns, L queries, N heads, D head dim, P parts.
"""

from collections.abc import Sequence
from itertools import product

import pytest
import torch
from torch import Tensor

from clear_dist.geometry import Rows
from clear_dist.kernels import merging, usable
from clear_dist.merge import RowsPart, merge, merge_rows, merge_stacked, pack_part, relay, unpack_lse, unweigh, weigh

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {
    torch.float32: {"atol": 1e-6, "rtol": 1e-6},
    torch.bfloat16: {"atol": 1e-6, "rtol": 2**-7},
    torch.float16: {"atol": 1e-6, "rtol": 2**-11},
}
"""Errors of float32's sums; of one rounding to 16 bits: the interpreter cuts off where a GPU rounds, to bfloat16."""


def test_kernels_run_here() -> None:
    assert usable("cpu")


def part(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, some of it -inf with NaN beside it; neither is contiguous."""
    out = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., : shape[-1]]
    lse = (torch.randn(*shape[:-3], *shape[-3:-1][::-1]) * 10).transpose(-1, -2)
    empty = torch.rand(lse.shape) < 0.2
    out[empty], lse[empty] = torch.nan, -torch.inf
    return out, lse


def expected(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(out, lse) in float64."""
    lse = torch.stack([lse for _, lse in parts]).double()
    out = torch.stack([out for out, _ in parts]).double().masked_fill(lse.isneginf()[..., None], 0)
    share = lse.softmax(0).nan_to_num(0)
    return (share[..., None] * out).sum(0), lse.logsumexp(0)


def nan_filled(*shape: int, dtype: torch.dtype) -> Tensor:
    """A view with gaps between rows of numbers, which must stay NaN."""
    whole = torch.full((*shape[:-1], shape[-1] + 3), torch.nan, dtype=dtype)
    return whole[..., 1 : shape[-1] + 1]


def check(found: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), right, **TOLERANCE[dtype])
    if found._base is not None and found._base.shape[-1] == found.shape[-1] + 3:
        assert found._base[..., 0].isnan().all() and found._base[..., -2:].isnan().all()


@pytest.mark.parametrize(("dtype", "count"), list(product(DTYPES, (2, 5))), ids=str)
def test_parts_merge_to_the_whole(dtype: torch.dtype, count: int) -> None:
    parts = [part(2, 7, 3, 20, dtype=dtype) for _ in range(count)]
    out, lse = merge(parts)
    right, right_lse = expected(parts)
    check(out, right, dtype)
    torch.testing.assert_close(lse.double(), right_lse, atol=1e-5, rtol=1e-6)


ALONE = Rows(3, 8)
"""Rows of a stripe."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "others", [(Rows(3, 4), Rows(7, 8)), (Rows(3, 7), Rows(5, 8)), (ALONE, Rows(3, 5)), (Rows(6, 8),)], ids=str
)
@pytest.mark.parametrize("in_place", [False, True])
def test_rows_merge_from_parts_that_cover_them(others: tuple[Rows, ...], dtype: torch.dtype, in_place: bool) -> None:
    merged = nan_filled(2, 5, 4, 3, 16, dtype=dtype)
    parts = [RowsPart(rows, *part(2, len(rows), 4, 3, 16, dtype=dtype)) for rows in (ALONE, *others)]
    parts[0].out.nan_to_num_(0)  # else it would stay where it is alone
    whole = [
        tuple(torch.full((2, 5, *x.shape[2:]), -torch.inf, dtype=torch.float64) for x in (each.out, each.lse))
        for each in parts
    ]
    for each, (out, lse) in zip(parts, whole, strict=True):
        here = each.rows.relative_to(3)
        out[:, here], lse[:, here] = each.out.double(), each.lse.double()
    if in_place:
        merged.copy_(parts[0].out)
        parts[0] = RowsPart(ALONE, merged, parts[0].lse)
    merge_rows(parts, merged, 3)
    check(merged, expected(whole)[0], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_part_that_is_in_its_place_is_left_there(dtype: torch.dtype) -> None:
    merged, lse = part(1, 5, 4, 3, 16, dtype=dtype)
    before = merged.clone()
    merge_rows([RowsPart(ALONE, merged, lse)], merged, 3)
    assert torch.equal(before.nan_to_num(7), merged.nan_to_num(7))


@pytest.mark.parametrize(("dtype", "ranks"), list(product(DTYPES, (1, 3))), ids=str)
def test_ranks_sum_what_was_weighed(dtype: torch.dtype, ranks: int) -> None:
    parts = [part(2, 7, 3, 20, dtype=dtype) for _ in range(ranks)]
    maximum = torch.stack([lse for _, lse in parts]).amax(0)
    terms = torch.full((ranks, 2, 7, 3, 21), torch.nan)
    for (out, lse), each in zip(parts, terms, strict=True):
        weigh(out, lse, maximum, each)
    merged = nan_filled(2, 7, 3, 20, dtype=dtype)
    unweigh(terms.sum(0), merged)
    check(merged, expected(parts)[0], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_is_followed_by_the_next_terms(dtype: torch.dtype) -> None:
    """Against the next part's own log-sum-exp, which is cut off where it is far from that of the sum."""
    terms, reference = torch.rand(2, 7, 3, 21), torch.randn(2, 7, 3)
    terms[0, 0, 0] = 0  # no rank had keys
    known = reference.double() + terms[..., -1].double().log()
    right = (terms[..., :-1].double() / terms[..., -1:].double()).nan_to_num(0)
    out, lse = part(2, 7, 3, 20, dtype=dtype)
    out, lse[1, 1] = out.nan_to_num(1), known[1, 1].float() + torch.tensor([5.0, 70.0, -70.0])
    before = nan_filled(2, 7, 3, 20, dtype=dtype)
    relay(terms, reference, out, lse, before, 60.0)
    check(before, right, dtype)
    torch.testing.assert_close(reference.double(), known, atol=1e-6, rtol=1e-6)
    weight = (lse.double() - known).clamp(-60, 60).exp().masked_fill(known.isneginf(), 0)
    torch.testing.assert_close(terms[..., -1].double(), weight, atol=0, rtol=1e-5)
    torch.testing.assert_close(terms[..., :-1].double(), weight[..., None] * out.double(), atol=0, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "weighs"), list(product(DTYPES, (False, True))), ids=str)
@pytest.mark.parametrize("counts", [(4, 4, 4), (3, 3, 2), (1, 1, 0)], ids=str)
def test_parts_are_packed_for_their_ranks_and_merged_there(
    counts: tuple[int, ...], weighs: bool, dtype: torch.dtype
) -> None:
    tokens, bits = sum(counts), (4 // dtype.itemsize if weighs else 0)
    parts, messages = [part(2, tokens, 3, 20, dtype=dtype) for _ in counts], []
    if not weighs:
        parts = [(out.nan_to_num(1), lse) for out, lse in parts]
    for rank, (out, lse) in enumerate(parts):
        before, own = sum(counts[:rank]), counts[rank]
        order = [*range(before), *range(before + own, tokens), *range(before, before + own)]  # as attention has them
        message = torch.full((tokens, 2, 3, 20 + bits), torch.nan, dtype=dtype)
        where = {"first": tokens - own, "to": before}
        pack_part(out[:, order], lse[:, order] if weighs else None, message.transpose(0, 1), **where)
        messages.append(message)
    for rank, own in enumerate(counts):
        mine = slice(sum(counts[:rank]), sum(counts[:rank]) + own)
        received = torch.stack([message[mine] for message in messages]).transpose(1, 2)
        merged = nan_filled(2, own, 3, 20, dtype=dtype)
        merge_stacked(received[..., :20], unpack_lse(received, 20) if weighs else None, merged)
        here = [(out[:, mine], lse[:, mine]) for out, lse in parts]
        mean = torch.stack([out for out, _ in here]).double().mean(0)
        check(merged, expected(here)[0] if weighs else mean, dtype)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("counts", [(4, 4, 4), (3, 3, 2), (1, 1, 0), (2, 1, 1, 1)], ids=str)
def test_tokens_of_other_ranks_come_to_their_place(counts: tuple[int, ...], batch: int) -> None:
    """Also where a token has more numbers than are copied at once; shorter messages end in NaN."""
    tokens, shape = sum(counts), (30, 40)
    whole = torch.randn(3, batch, tokens, *shape)
    arrived = torch.full((len(counts), max(counts), 3, batch, *shape), torch.nan)
    for rank, (message, own) in enumerate(zip(arrived, counts, strict=True)):
        message[:own] = whole[:, :, sum(counts[:rank]) :][:, :, :own].permute(2, 0, 1, 3, 4)
    for rank, own in enumerate(counts):
        before = sum(counts[:rank])
        tensors = [torch.full((batch, tokens + 5, *shape), torch.nan) for _ in range(3)]
        merging.spread(arrived, counts, rank, tensors)
        for tensor, right in zip(tensors, whole, strict=True):
            assert torch.equal(
                tensor[:, : tokens - own], torch.cat([right[:, :before], right[:, before + own :]], dim=1)
            )
            assert tensor[:, tokens - own :].isnan().all()
