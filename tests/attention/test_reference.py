"""The oracle against sums written out in Python."""

import math

import pytest
import torch
from torch import Tensor

from tests.attention.calls import Case


def softmax_by_hand(query: Tensor, keys: list[Tensor], values: list[Tensor], scale: float) -> tuple[Tensor, float]:
    weights = [math.exp(float(query.double() @ key.double()) * scale) for key in keys]
    total = sum(weights)
    if not total:
        return torch.zeros(len(query), dtype=torch.float64), -math.inf
    return sum((w * v.double() for w, v in zip(weights, values, strict=True)), torch.zeros(1)) / total, math.log(total)


@pytest.mark.parametrize(
    "case",
    [
        Case(rows=3, key_rows=5, columns=4, text=2, radius=2, row_offset=1, batch=2, head_dim=3),
        Case(rows=4, key_rows=4, columns=3, text=0, radius=3, heads=1, head_dim=2),
        Case(rows=1, key_rows=6, columns=1, text=1, radius=9, row_offset=5, head_dim=2, scale=0.3),
        Case(rows=5, key_rows=2, columns=2, text=0, radius=2, row_offset=-3, head_dim=2),
        Case(rows=5, key_rows=2, columns=2, text=0, radius=2, row_offset=1, head_dim=2),
        Case(rows=5, key_rows=2, columns=2, text=1, radius=2, row_offset=-7, head_dim=2),
        Case(rows=2, key_rows=0, columns=2, text=0, radius=2, head_dim=2),
    ],
    ids=str,
)
def test_reference_is_the_definition(case: Case) -> None:
    query, key, value, key_text, value_text = tensors = case.tensors()
    out, lse = case.run("reference", tensors)
    scale = case.scale or case.head_dim**-0.5
    for b in range(case.batch):
        for n in range(case.heads):
            for i in range(case.rows):
                for j in range(case.columns):
                    seen = [
                        (y, x)
                        for y in range(case.key_rows)
                        for x in range(case.columns)
                        if (y - i - case.row_offset) ** 2 + (x - j) ** 2 < case.radius**2
                    ]
                    keys = [*key_text[b, :, n], *(key[b, y, x, n] for y, x in seen)]
                    values = [*value_text[b, :, n], *(value[b, y, x, n] for y, x in seen)]
                    expected, expected_lse = softmax_by_hand(query[b, i, j, n], keys, values, scale)
                    torch.testing.assert_close(out[b, i, j, n].double(), expected, atol=1e-6, rtol=1e-5)
                    assert float(lse[b, i, j, n]) == pytest.approx(expected_lse, abs=1e-5)


def test_the_window_is_strict() -> None:
    """At radius 2 the key two columns away is not seen, the one at (1, 1) is."""
    case = Case(rows=3, key_rows=3, columns=3, text=0, radius=2, heads=1, head_dim=2)
    query, key, value, *text = case.tensors()
    value = torch.zeros_like(value)
    value[:, 0, 2] = 1.0
    out, _ = case.run("reference", (torch.zeros_like(query), key, value, *text))
    hit = out[0, ..., 0, 0] > 0
    assert hit.tolist() == [[False, True, True], [False, True, True], [False, False, False]]
