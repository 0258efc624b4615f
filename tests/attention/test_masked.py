"""What bands of query rows promise beyond being right: they read less, and share a mask."""

from dataclasses import replace

import pytest
import torch

from clear_dist.attention import masked
from clear_dist.attention.backend import CallShape, WindowCall
from tests.attention.calls import Case

NAMES = ("query", "key", "value", "key_text", "value_text")


def call_of(case: Case, tensors: tuple[torch.Tensor, ...]) -> WindowCall:
    named = dict(zip(NAMES, tensors, strict=True))
    return WindowCall(**named, radius=case.radius, row_offset=case.row_offset, scale=0.25)


@pytest.mark.parametrize("band_queries", [1, 26, 60, 26 * 19, 26 * 30])
@pytest.mark.parametrize("text", [0, 5])
@pytest.mark.parametrize(("key_rows", "row_offset"), [(19, 0), (33, 7), (30, 15), (3, 3), (4, -15)])
def test_any_bands_give_the_same(band_queries: int, text: int, key_rows: int, row_offset: int) -> None:
    """Also halos, bands of text keys only, and a last band that is cut short."""
    case = Case(rows=19, key_rows=key_rows, columns=26, text=text, radius=5, row_offset=row_offset, batch=2)
    query, *others = case.tensors()
    if not text:  # only queries that see a key reach a backend
        rows = torch.arange(19)[:, None] + row_offset - torch.arange(key_rows)
        query = query[:, (rows.abs() < 5).any(1)]
        case = replace(case, row_offset=max(row_offset, -4))
    tensors = (query, *others)
    results = masked.run_on_cpu(call_of(case, tensors), band_queries)
    torch.testing.assert_close(results, case.run("reference", tensors, scale=0.25), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("device", "radius", "elements"),
    [("cpu", 16, 256 * (9 + 34 * 64)), ("cpu", 64, 4096 * (9 + 4096)), ("cuda", 16, 4096 * (9 + 4096))],
)
def test_the_check_knows_the_largest_mask(device: str, radius: int, elements: int) -> None:
    """A band's, unless every query sees every row; on a GPU that of the whole call."""
    shape = CallShape(device, torch.float32, 16, 1, rows=64, key_rows=64, columns=64, text=9, radius=radius)
    assert masked.most_in_mask(shape) == elements


def test_bands_read_only_rows_within_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts pairs of query and key that the kernel is given."""
    pairs = []
    fused = masked.fused

    def counting(query: torch.Tensor, key: torch.Tensor, *others: object) -> tuple[torch.Tensor, torch.Tensor]:
        pairs.append(query.shape[2] * key.shape[2])
        return fused(query, key, *others)

    monkeypatch.setattr(masked, "fused", counting)
    case = Case(rows=64, key_rows=64, columns=64, text=9, radius=8, heads=1)
    case.run("masked", case.tensors())
    # 16 bands of 4 rows: 4 + 7 rows of keys for those at the border, 4 + 2 * 7 for the others, less what is beyond it.
    assert sum(pairs) == 4 * 64 * 64 * (2 * 11 + 2 * 15 + 12 * 18)
