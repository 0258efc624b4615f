"""Merging parts by log-sum-exp gives attention over all keys. Suffixes: B batch, L queries, N heads, D head dim."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clear_dist.geometry import Rows
from clear_dist.merge import RowsPart, merge, merge_rows, unweigh, weigh

SHAPE = (2, 5, 3, 4)


def softmax_part(score_BLNS: Tensor, value_SD: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of one set of keys, in float64 and then rounded."""
    if score_BLNS.shape[-1] == 0:
        return torch.zeros(SHAPE), torch.full(SHAPE[:3], -torch.inf)
    out = score_BLNS.double().softmax(-1) @ value_SD.double()
    return out.float(), score_BLNS.double().logsumexp(-1).float()


@given(cuts=st.lists(st.integers(0, 12), max_size=4), spread=st.sampled_from([1.0, 30.0, 300.0]))
@settings(max_examples=40)
def test_parts_merge_to_the_whole(cuts: list[int], spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(*SHAPE[:3], 12, generator=generator) * spread
    value = torch.randn(12, SHAPE[3], generator=generator)
    ends = [0, *sorted(cuts), 12]
    parts = [softmax_part(score[..., a:b], value[a:b]) for a, b in pairwise(ends)]
    out, lse = merge(parts)
    expected_out, expected_lse = softmax_part(score, value)
    torch.testing.assert_close(out, expected_out, atol=1e-5 * spread, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse)


def test_a_part_without_keys_counts_for_nothing_whatever_its_output() -> None:
    out, lse = torch.randn(SHAPE), torch.randn(SHAPE[:3])
    empty = torch.full(SHAPE, torch.nan), torch.full(SHAPE[:3], -torch.inf)
    merged_out, merged_lse = merge([empty, (out, lse), empty])
    torch.testing.assert_close(merged_out, out)
    torch.testing.assert_close(merged_lse, lse)


def test_no_keys_at_all_give_zero_and_minus_infinity() -> None:
    empty = torch.full(SHAPE, torch.nan), torch.full(SHAPE[:3], -torch.inf)
    out, lse = merge([empty, empty])
    assert torch.equal(out, torch.zeros(SHAPE))
    assert lse.isneginf().all()


def test_the_dtype_is_kept_and_sums_are_in_float32() -> None:
    out, lse = torch.randn(SHAPE).bfloat16(), torch.randn(SHAPE[:3])
    merged_out, merged_lse = merge([(out, lse), (out, lse)])
    assert merged_out.dtype == torch.bfloat16
    assert merged_lse.dtype == torch.float32
    torch.testing.assert_close(merged_out, out)
    torch.testing.assert_close(merged_lse, lse + torch.tensor(2.0).log())


def test_ranks_may_sum_output_and_weight_in_one_buffer() -> None:
    parts = [(torch.randn(SHAPE), torch.randn(SHAPE[:3]) * 20) for _ in range(4)]
    maximum = torch.stack([lse for _, lse in parts]).amax(0)
    buffers = torch.full((4, *SHAPE[:3], SHAPE[3] + 1), torch.nan)
    for part, buffer in zip(parts, buffers, strict=True):
        weigh(*part, maximum, buffer)
    out = torch.full(SHAPE, torch.nan)
    unweigh(buffers.sum(0), out)
    torch.testing.assert_close(out, merge(parts)[0])


def test_nothing_to_merge_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one part"):
        merge([])


@pytest.mark.parametrize("others", [[], [Rows(7, 9)], [Rows(7, 10), Rows(9, 12)], [Rows(7, 12), Rows(7, 12)]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_is_merged_from_the_parts_that_concern_it(others: list[Rows], dtype: torch.dtype) -> None:
    rows = [Rows(7, 12), *others]
    parts = [RowsPart(r, torch.randn(2, len(r), 4, 3, 5).to(dtype), torch.randn(2, len(r), 4, 3)) for r in rows]
    merged = torch.full((2, 5, 4, 3, 5), torch.nan, dtype=dtype)
    merge_rows(parts, merged, 7)
    for row in range(7, 12):
        here = [part for part in parts if part.rows.start <= row < part.rows.stop]
        weights = torch.stack([part.lse[:, row - part.rows.start] for part in here]).double().softmax(0)
        outs = torch.stack([part.out[:, row - part.rows.start] for part in here]).double()
        # Rounded once: what float64 gives, in the parts' dtype.
        torch.testing.assert_close(
            merged[:, row - 7],
            (weights[..., None] * outs).sum(0).to(dtype),
            atol=1e-6,
            rtol=8e-3 if dtype == torch.bfloat16 else 1e-5,
        )
