"""Dense attention and its log-sum-exp against float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from clear_dist.attention import attend, dense
from clear_dist.merge import merge


def by_definition(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    score = torch.einsum("blnd,bsnd->blns", query.double(), key.double()) * scale
    return torch.einsum("blns,bsnd->blnd", score.softmax(-1), value.double()), score.logsumexp(-1)


def inputs(queries: int, keys: int, dtype: torch.dtype = torch.float32, batch: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, n, 3, 16, generator=generator).to(dtype) for n in (queries, keys, keys)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize(("queries", "keys", "batch"), [(1, 1, 1), (7, 300, 2), (33, 1025, 1), (800, 40, 1)])
def test_output_and_log_sum_exp(dtype: torch.dtype, tolerance: float, queries: int, keys: int, batch: int) -> None:
    tensors = inputs(queries, keys, dtype, batch)
    out, lse = attend(*tensors)
    expected_out, expected_lse = by_definition(*tensors, scale=0.25)
    assert out.dtype == dtype
    assert out.shape == (batch, queries, 3, 16)
    assert lse.dtype == torch.float32
    assert lse.shape == (batch, queries, 3)
    torch.testing.assert_close(out.double(), expected_out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance, rtol=tolerance)


def test_scale_is_taken() -> None:
    tensors = inputs(5, 9)
    out, lse = attend(*tensors, scale=0.9)
    expected_out, expected_lse = by_definition(*tensors, scale=0.9)
    torch.testing.assert_close(out.double(), expected_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("queries", "keys"), [(5, 0), (0, 5), (0, 0)])
def test_nothing_to_attend_to(queries: int, keys: int) -> None:
    out, lse = attend(*inputs(queries, keys))
    assert torch.equal(out, torch.zeros(1, queries, 3, 16))
    assert torch.equal(lse, torch.full((1, queries, 3), -torch.inf))


def test_split_keys_merge_to_the_whole() -> None:
    query, key, value = inputs(6, 50)
    out, lse = merge([attend(query, key[:, a:b], value[:, a:b]) for a, b in ((0, 1), (1, 1), (1, 37), (37, 50))])
    expected_out, expected_lse = attend(query, key, value)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("scale", [None, 0.9])
@pytest.mark.parametrize("masked", [False, True])
def test_devices_without_a_kernel_do_the_same(scale: float | None, masked: bool) -> None:
    heads_first = [tensor.transpose(1, 2) for tensor in inputs(6, 11)]
    hidden = torch.zeros(6, 11).masked_fill(torch.rand(6, 11) < 0.4, -torch.inf)
    hidden[:, 3] = 0
    bias = hidden if masked else None
    torch.testing.assert_close(dense._math(*heads_first, scale, bias), dense.fused(*heads_first, scale, bias))


class Recorded(TorchDispatchMode):
    """While inside, `names` are the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("capability", "dtype", "kernel"),
    [
        ((7, 5), torch.float16, "efficient"),
        ((7, 5), torch.float32, "efficient"),
        ((8, 0), torch.float16, "flash"),
        ((8, 0), torch.float32, "efficient"),
        ((12, 0), torch.bfloat16, "flash"),
    ],
)
def test_each_gpu_gets_a_kernel_that_it_has(
    capability: tuple[int, int], dtype: torch.dtype, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with FakeTensorMode(), Recorded() as recorded:
        query = torch.empty(1, 2, 5, 16, dtype=dtype, device="cuda")
        dense.fused(query, query, query, None)
    assert f"aten::_scaled_dot_product_{kernel}_attention" in recorded.names


@pytest.mark.parametrize("pieces", [1, 2, 7, 50, 90])
@pytest.mark.parametrize(("batch", "dtype", "tolerance"), [(1, torch.float32, 1e-5), (2, torch.bfloat16, 2e-2)])
def test_keys_in_pieces_give_the_same(pieces: int, batch: int, dtype: torch.dtype, tolerance: float) -> None:
    tensors = inputs(6, 50, dtype, batch)
    out, lse = attend(*tensors, scale=0.4, pieces=pieces)
    expected_out, expected_lse = by_definition(*tensors, scale=0.4)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.double(), expected_out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("blocks", "keys", "pieces"),
    [(96, 262656, 11), (96, 66048, 8), (96, 4608, 1), (96, 100, 1), (2000, 262656, 1), (1, 262656, 32)],
)
def test_pieces_fill_the_processors_and_are_not_too_short(blocks: int, keys: int, pieces: int) -> None:
    """132 processors; 96 blocks are 512 text tokens and 24 heads."""
    assert dense.count_pieces(blocks, keys, processors=132) == pieces
