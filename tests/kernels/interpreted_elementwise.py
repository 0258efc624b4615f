"""The fused parts of a block beside torch's; `test_elementwise.py` runs this file in Triton's interpreter."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from clear_dist.engine import fused
from clear_dist.engine.fused import Fused
from clear_dist.engine.parts import Parts

TOKENS, CHUNK = 7, slice(1, 6)
"""Tokens of a tensor, and those of them that are computed: nothing but channels lies together."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = ((1, 32), (2, 48), (1, 3072))
"""Pictures and channels."""
HEADS = ((1, 2, 16), (2, 3, 24), (1, 24, 128), (1, 5, 256), (2, 1, 2))
"""Pictures, heads and head dims."""
PRODUCT = nn.Identity()
"""Stands in for layers, whose rounding would be larger than that of what is around them."""
WITHIN = 2e-6
"""Error over the largest number, in float32."""

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_size = pytest.mark.parametrize(("batch", "channels"), SIZES)


@pytest.fixture(autouse=True)
def as_drawn() -> Iterator[None]:
    """No gradients, and no way back to torch's forms."""
    torch.manual_seed(0)
    with torch.no_grad(), mock.patch.object(fused, "parts", None):
        yield


def drawn(module: nn.Module, dtype: torch.dtype) -> Any:
    for parameter in module.parameters():
        fan_in = parameter.shape[-1] if parameter.ndim > 1 else 1
        parameter.copy_(torch.randn(parameter.shape) / fan_in**0.5)
    return module.to(dtype)


def chunk(dtype: torch.dtype, batch: int, *shape: int) -> Tensor:
    return torch.randn(batch, TOKENS, *shape).to(dtype)[:, CHUNK]


def modulation(dtype: torch.dtype, batch: int, channels: int, count: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, count * channels).to(dtype).chunk(count, dim=1)


def in_double(x: Any) -> Any:
    if isinstance(x, list | tuple):
        return [in_double(each) for each in x]
    return deepcopy(x).double()


def written(part: Any, arguments: Any, dtype: torch.dtype, shape: tuple[int, ...] | None, count: int = 1) -> Tensor:
    """What a part returns, or writes [B, L, *shape] to: a place in a larger tensor, where nothing else changes.

    `count`: as so many tensors, each with its share of the third dimension.
    """
    if shape is None:
        return part(*arguments)
    batch, channels = shape[0], shape[-1]
    whole = torch.full((batch, TOKENS, *shape[1:-1], channels + 5), torch.nan, dtype=dtype)
    out = whole[:, CHUNK, ..., 5:]
    part(*arguments, *out.chunk(count, dim=2))
    found = out.clone()
    out.fill_(torch.nan)
    assert whole.isnan().all()
    return found


def compare(name: str, *arguments: Any, dtype: torch.dtype, out: tuple[int, ...] | None = None, count: int = 1) -> None:
    """Both forms with the same arguments, beside torch's in float64."""
    ours, theirs = (written(getattr(form, name), arguments, dtype, out, count) for form in (Fused().parts, Parts()))
    exact = written(getattr(Parts(), name), in_double(arguments), torch.float64, out, count)
    assert ours.dtype == theirs.dtype == dtype and exact.isfinite().all()
    errors, most = [(x.double() - exact).abs() for x in (ours, theirs)], exact.abs().max()
    if dtype == torch.float32:
        assert errors[0].max() < WITHIN * most
    else:
        assert errors[0].square().mean() <= errors[1].square().mean()
        assert errors[0].max() <= errors[1].max()


def layer_norm(channels: int) -> nn.Module:
    return nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)


@by_dtype
@by_size
def test_modulate(batch: int, channels: int, dtype: torch.dtype) -> None:
    x = 3 + 2 * chunk(dtype, batch, channels)
    compare("modulate", layer_norm(channels), x, *modulation(dtype, batch, channels, 2), dtype=dtype)


def test_one_modulation_for_all_pictures() -> None:
    """What lies behind it is no modulation of the second one."""
    batch, channels = 2, 48
    x, y = (chunk(torch.float32, batch, channels) for _ in range(2))
    shift, scale, gate = (
        torch.cat([torch.randn(1, channels), torch.full((1, channels), torch.nan)])[:1] for _ in "123"
    )
    compare("modulate", layer_norm(channels), x, shift, scale, dtype=torch.float32)
    compare("add_gated", PRODUCT, x, y, gate, dtype=torch.float32, out=(batch, channels))
    layers = PRODUCT, layer_norm(channels), PRODUCT
    arguments = layers, x, y, (gate, shift, scale, gate)
    compare("add_attention_and_mlp", *arguments, dtype=torch.float32, out=(batch, channels))


@by_dtype
@by_size
def test_project(batch: int, channels: int, dtype: torch.dtype) -> None:
    """Into heads, which lie together."""
    for bias in (True, False):
        linear = drawn(nn.Linear(32, channels, bias=bias), dtype)
        x, whole = chunk(dtype, batch, 32), torch.full((batch, TOKENS, 2, channels // 2), torch.nan, dtype=dtype)
        Fused().project(linear, x, whole[:, CHUNK])
        assert torch.equal(whole[:, CHUNK].flatten(2), torch.stack([linear(each) for each in x]))
        assert whole[:, 0].isnan().all() and whole[:, 6].isnan().all()


@by_dtype
@pytest.mark.parametrize(("batch", "heads", "head_dim"), HEADS)
def test_rotate(batch: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    angle = 9 * torch.rand(TOKENS, head_dim // 2).repeat_interleave(2, dim=1)[CHUNK]
    for kind in (nn.RMSNorm, RMSNorm):
        norm, x = drawn(kind(head_dim, eps=1e-6), dtype), 2 * chunk(dtype, batch, heads * head_dim)
        arguments = [(PRODUCT, norm)], x, angle.cos(), angle.sin()
        compare("rotate", *arguments, dtype=dtype, out=(batch, heads, head_dim))


class Reversed(nn.Module):
    """Stands in for another layer, exactly."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1)


@by_dtype
@pytest.mark.parametrize(("batch", "heads", "head_dim"), HEADS)
def test_rotate_keys_and_queries_at_once(batch: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    angle = 9 * torch.rand(TOKENS, head_dim // 2).repeat_interleave(2, dim=1)[CHUNK]
    norms, x = [drawn(nn.RMSNorm(head_dim, eps=1e-6), dtype) for _ in range(2)], chunk(dtype, batch, heads * head_dim)
    arguments = list(zip((PRODUCT, Reversed()), norms, strict=True)), x, angle.cos(), angle.sin()
    compare("rotate", *arguments, dtype=dtype, out=(batch, 2 * heads, head_dim), count=2)


@by_dtype
@by_size
def test_widen(batch: int, channels: int, dtype: torch.dtype) -> None:
    """From where GELU is nothing to where it is all."""
    arguments = PRODUCT, nn.GELU(approximate="tanh"), 4 * chunk(dtype, batch, 2 * channels)
    compare("widen", *arguments, dtype=dtype, out=(batch, 2 * channels))


@by_dtype
@by_size
def test_add_gated(batch: int, channels: int, dtype: torch.dtype) -> None:
    x, y = chunk(dtype, batch, channels), chunk(dtype, batch, channels)
    compare("add_gated", PRODUCT, x, y, *modulation(dtype, batch, channels, 1), dtype=dtype, out=(batch, channels))


@by_dtype
@by_size
def test_add_attention_and_mlp(batch: int, channels: int, dtype: torch.dtype) -> None:
    x, attended = (chunk(dtype, batch, channels) for _ in range(2))
    arguments = (PRODUCT, layer_norm(channels), PRODUCT), x, attended, modulation(dtype, batch, channels, 4)
    compare("add_attention_and_mlp", *arguments, dtype=dtype, out=(batch, channels))


@pytest.mark.parametrize("shape", [(1, 2, 32), (2, 1, 32)], ids=["tokens", "pictures"])
def test_tensors_of_more_elements_than_an_int32_counts(shape: tuple[int, int, int]) -> None:
    """Far from each other in memory of which nothing else is touched."""
    far = 2**31 + 32
    near = torch.randn(shape, dtype=torch.bfloat16)
    x = torch.empty(far + 32, dtype=torch.bfloat16).as_strided(shape, (far, far, 1)).copy_(near)
    per_picture = modulation(torch.bfloat16, shape[0], 32, 2)
    found, expected = (Fused().modulate(layer_norm(32), each, *per_picture) for each in (x, near))
    assert torch.equal(found, expected)


def test_no_tokens() -> None:
    linear, norm, empty = drawn(nn.Linear(32, 32), torch.float32), layer_norm(32), torch.empty(1, 0, 32)
    rms_norm, turns = drawn(nn.RMSNorm(16, eps=1e-6), torch.float32), torch.empty(0, 16)
    parts, per_picture = Fused().parts, modulation(torch.float32, 1, 32, 4)
    assert parts.modulate(norm, empty, *per_picture[:2]).shape == (1, 0, 32)
    parts.project(linear, empty, torch.empty(1, 0, 2, 16))
    parts.rotate([(linear, rms_norm)], empty, turns, turns, torch.empty(1, 0, 2, 16))
    parts.widen(linear, nn.GELU(approximate="tanh"), empty, torch.empty(1, 0, 32))
    parts.add_gated(linear, empty, empty, per_picture[0], torch.empty(1, 0, 32))
    parts.add_attention_and_mlp((linear, norm, linear), empty, empty, per_picture, torch.empty(1, 0, 32))
