"""Square windows: every backend that has them against the definition, on stripes against whole pictures."""

import math

import pytest
import torch

from clear_dist.attention import BACKENDS, choose_backend
from clear_dist.attention.backend import CallShape
from clear_dist.options import Options, Refusal
from tests.attention.calls import Case

SQUARE = CallShape("cpu", torch.float32, square=True)
NAMES = [name for name, backend in BACKENDS.items() if backend.why_not_here(SQUARE) is None]
CASES = [
    Case(rows=13, key_rows=13, columns=11, text=7, radius=4, square=True),
    Case(rows=40, key_rows=40, columns=37, text=33, radius=8, square=True),
    Case(rows=9, key_rows=23, columns=30, text=5, radius=8, row_offset=7, batch=2, square=True),
    Case(rows=20, key_rows=7, columns=21, text=0, radius=8, row_offset=7, square=True),
    Case(rows=20, key_rows=7, columns=21, text=0, radius=8, row_offset=-20, square=True),
    Case(rows=9, key_rows=5, columns=12, text=0, radius=4, row_offset=8, square=True),
    Case(rows=6, key_rows=6, columns=7, text=130, radius=40, square=True),
    Case(rows=20, key_rows=20, columns=20, text=0, radius=1, square=True),
]


def test_all_but_triton_have_squares() -> None:
    assert {"reference", "masked", "tiled", "flex"} <= set(NAMES)
    assert choose_backend("auto", device="cpu", dtype=torch.float32, square=True).name in NAMES
    assert BACKENDS["triton"].why_not(SQUARE) == "its windows are circles"
    with pytest.raises(Refusal, match="--attention-backend triton has circles only"):
        Options(window=8, window_shape="square", attention_backend="triton")


def test_a_full_window_has_no_shape() -> None:
    told = "--window-shape must be circle where the window is full, got square; nearest: circle"
    with pytest.raises(Refusal, match=told):
        Options(window="full", window_shape="square")
    with pytest.raises(Refusal, match=told):
        Options(window_shape="square").settled("full")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_key_is_seen_less_than_the_radius_away_on_both_axes(name: str, case: Case) -> None:
    query, key, value, key_text, value_text = tensors = case.tensors()
    out, lse = case.run(name, tensors)
    row, column = torch.meshgrid(torch.arange(case.rows) + case.row_offset, torch.arange(case.columns), indexing="ij")
    key_row, key_column = torch.meshgrid(torch.arange(case.key_rows), torch.arange(case.columns), indexing="ij")
    down, across = row.reshape(-1, 1) - key_row.flatten(), column.reshape(-1, 1) - key_column.flatten()
    near = (down > -case.radius) & (down < case.radius) & (across > -case.radius) & (across < case.radius)
    seen = torch.cat([torch.ones(len(near), case.text, dtype=torch.bool), near], dim=1)
    keys, values = (
        torch.cat([text, x.flatten(1, 2)], 1).double() for text, x in ((key_text, key), (value_text, value))
    )
    scores = torch.einsum("blnd,bsnd->blns", query.flatten(1, 2).double(), keys) / math.sqrt(case.head_dim)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    expected = torch.einsum("blns,bsnd->blnd", scores.softmax(-1).nan_to_num(0.0), values)
    torch.testing.assert_close(out.flatten(1, 2).double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.flatten(1, 2).double(), scores.logsumexp(-1), atol=1e-5, rtol=1e-5)
