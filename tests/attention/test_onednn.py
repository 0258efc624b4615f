"""Attention with products by oneDNN, against float64 and the reference backend, at sizes that they take and below."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from clear_dist.attention import attend, onednn
from clear_dist.plan.allocated import Allocated
from tests.attention.calls import Case

CLOSE = {"rtol": 1e-5, "atol": 2e-6}

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def by_definition(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, [B, N, L, D] and [B, N, L]; 0 where no key is seen."""
    score = query.double() @ key.double().transpose(2, 3) * 0.2 + bias.double()
    return (score.softmax(-1).nan_to_num() @ value.double()).float(), score.logsumexp(-1).float()


@pytest.mark.parametrize("most_scores", [1, 500, 2**19])
@pytest.mark.parametrize("factor", [1, 100])
def test_output_and_log_sum_exp(monkeypatch: pytest.MonkeyPatch, most_scores: int, factor: int) -> None:
    monkeypatch.setattr(onednn, "FEWEST_QUERIES", 1)
    monkeypatch.setattr(onednn, "MOST_SCORES", most_scores)
    tensors = [torch.randn(2, n, 3, 20)[..., :16].transpose(1, 2) for n in (37, 90, 90)]
    tensors[0] = tensors[0] * factor
    close = {"rtol": 1e-5, "atol": 2e-6 * factor}  # scores, and so their errors, grow with the queries
    for bias in (torch.zeros(37, 90), torch.randn(37, 90), torch.randn(2, 1, 37, 90)):
        assert_close(onednn.attend(*tensors, 0.2, bias), by_definition(*tensors, bias), **close)
    assert_close(onednn.attend(*tensors, 0.2), by_definition(*tensors, torch.zeros(37, 90)), **close)


def test_a_query_that_sees_no_key_has_an_output_of_0() -> None:
    tensors = [torch.randn(1, 2, n, 16) for n in (37, 90, 90)]
    bias = torch.zeros(37, 90).masked_fill_(torch.rand(37, 90) < 0.5, -torch.inf)
    bias[[0, 20]] = -torch.inf
    out, lse = onednn.attend(*tensors, 0.2, bias)
    assert_close((out, lse), by_definition(*tensors, bias), **CLOSE)
    assert not out[:, :, [0, 20]].any() and lse[:, :, [0, 20]].isneginf().all()


@pytest.mark.parametrize("backend", ["tiled", "masked"])
@pytest.mark.parametrize(("key_rows", "row_offset"), [(19, 0), (33, 7), (19, 9), (19, -19), (33, 40)])
@pytest.mark.parametrize("text", [0, 5, 130])
def test_windows(monkeypatch: pytest.MonkeyPatch, backend: str, key_rows: int, row_offset: int, text: int) -> None:
    monkeypatch.setattr(onednn, "FEWEST_QUERIES", 1)
    monkeypatch.setattr(onednn, "FEWEST_MULTIPLICATIONS", 1)
    case = Case(rows=19, key_rows=key_rows, columns=26, text=text, radius=4, row_offset=row_offset, batch=2)
    tensors = case.tensors()
    assert_close(case.run(backend, tensors), case.run("reference", tensors), rtol=1e-5, atol=1e-5)


def test_long_keys() -> None:
    query, key, value = (torch.randn(2, n, 2, 32) for n in (200, 5000, 5000))
    assert onednn.takes(query.transpose(1, 2), key.transpose(1, 2))
    score = torch.einsum("blnd,bsnd->bnls", query.double(), key.double()) * 32**-0.5
    expected = torch.einsum("bnls,bsnd->blnd", score.softmax(-1), value.double()).float()
    assert_close(attend(query, key, value), (expected, score.logsumexp(-1).transpose(1, 2).float()), **CLOSE)


def test_what_torch_s_kernel_is_left() -> None:
    query, key = torch.randn(1, 2, 256, 64), torch.randn(1, 2, 2048, 64)
    assert onednn.takes(query, key)
    assert not onednn.takes(query.bfloat16(), key.bfloat16())
    assert not onednn.takes(query[:, :, :127], key) and not onednn.takes(query, key[:, :, :64])
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn.takes(query, key)
    with torch.enable_grad():
        assert not onednn.takes(query, key)
    with torch.autocast("cpu", torch.bfloat16):
        assert not onednn.takes(query, key)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_plan_sees_what_is_allocated(batch: int) -> None:
    peaks = []
    for device in ("cpu", "meta"):
        query, key, value = (torch.randn(batch, n, 3, 32, device=device).transpose(1, 2) for n in (300, 4000, 4000))
        bias = torch.zeros(300, 4000, device=device)
        with Allocated() as allocated:
            results = onednn.attend(query, key, value, None, bias)
            assert allocated.bytes == sum(x.nbytes for x in results)
        peaks.append(allocated.peak)
    assert peaks[0] == peaks[1] > 4 * (2 * 4000 * 32 + 131 * 4000)  # a head's keys and values, and scores
