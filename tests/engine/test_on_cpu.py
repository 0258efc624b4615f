"""Products by oneDNN in the parts of a block on a CPU, against the layers themselves in float64."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import peft
import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from clear_dist.engine.on_cpu import ON_CPU
from clear_dist.engine.parts import Parts
from clear_dist.weights.quantised import to_int8

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PRODUCTS = torch.ops.mkldnn._linear_pointwise.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.default

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


class Ran(TorchDispatchMode):
    """Counts products of matrices: by oneDNN, and by torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.by_onednn = self.by_torch = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.by_onednn += func is PRODUCTS[0]
        self.by_torch += func in PRODUCTS[1:]
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def exact(layer: nn.Module, x: Tensor) -> Tensor:
    return deepcopy(layer).double()(x.double()).float()


def widened(layer: nn.Module, x: Tensor, width: int, parts: Parts = ON_CPU) -> tuple[Tensor, int, int]:
    """The layer's output, and how many products went by oneDNN and by torch."""
    out = x.new_full((*x.shape[:-1], width + 5), torch.nan)
    with Ran() as ran:
        parts.widen(layer, nn.Identity(), x, out[..., 5:])
    assert out[..., :5].isnan().all()
    return out[..., 5:], ran.by_onednn, ran.by_torch


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer(bias: bool) -> None:
    layer, x = nn.Linear(24, 40, bias=bias), torch.randn(2, 7, 48)[:, 1:, ::2]
    out, *ran = widened(layer, x, 40)
    assert_close(out, exact(layer, x), **CLOSE)
    assert ran == [1, 0]


def lora(layer: nn.Module) -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    return peft.inject_adapter_in_model(config, nn.Sequential(layer))[0]


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda layer, given, output: output + 1)
    return layer


def mlp(layer: nn.Module) -> nn.Module:
    return FeedForward(24, activation_fn="gelu-approximate")


@pytest.mark.parametrize(("changed", "products"), [(lora, 3), (hooked, 1), (mlp, 2)])
def test_modules_that_have_linear_layers(changed: Any, products: int) -> None:
    layer, x = changed(nn.Linear(24, 24)), torch.randn(1, 5, 24)
    out, *ran = widened(layer, x, 24)
    assert_close(out, exact(layer, x), **CLOSE)
    assert ran == [products, 0]


def test_8_bits_without_kernels_of_their_own() -> None:
    holder, x = nn.Sequential(nn.Linear(24, 24)).requires_grad_(False), torch.randn(1, 5, 24)
    to_int8(holder, ["0"])
    out, *ran = widened(holder[0], x, 24)
    assert_close(out, holder[0](x), **CLOSE)
    assert ran == [1, 0]


def test_a_weight_with_gaps_is_left_to_torch() -> None:
    layer, x = nn.Linear(24, 24), torch.randn(1, 5, 24)
    layer.weight = nn.Parameter(torch.randn(24, 48)[:, ::2], requires_grad=False)
    out, *ran = widened(layer, x, 24)
    assert torch.equal(out, layer(x)) and ran == [0, 1]


def test_dtypes_gradients_and_autocast_are_left_to_torch() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(1, 3, 8)
    assert widened(layer, x, 8)[1:] == (1, 0)
    assert widened(deepcopy(layer).bfloat16(), x.bfloat16(), 8)[1:] == (0, 1)
    assert widened(layer, x, 8, Parts())[1:] == (0, 1)
    with torch.backends.mkldnn.flags(enabled=False):
        assert widened(layer, x, 8)[1:] == (0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert widened(layer, x, 8)[1:] == (0, 1)
    with torch.enable_grad():
        assert widened(layer.requires_grad_(False), x, 8)[1:] == (0, 1)


def test_each_part_goes_by_onednn() -> None:
    """The other layers and tensors of a part are those of its own form."""
    x, gate, linear, norm = torch.randn(2, 6, 16), torch.randn(2, 16), nn.Linear(16, 16), nn.LayerNorm(16)
    heads, turns = (2, 6, 4, 4), (torch.randn(6, 4), torch.randn(6, 4))
    rms = nn.RMSNorm(4)
    calls: dict[str, tuple[int, Any]] = {
        "modulate": (0, lambda part: part(norm, x, shift_BC=gate, scale_BC=gate)),
        "project": (1, lambda part: into(heads, lambda out: part(linear, x, out))),
        "rotate": (1, lambda part: into(heads, lambda out: part([(linear, rms)], x, *turns, out))),
        "add_gated": (1, lambda part: into(x.shape, lambda out: part(linear, x, x, gate, out))),
        "add_attention_and_mlp": (
            2,
            lambda part: into(x.shape, lambda out: part((linear, norm, linear), x, x, [gate] * 4, out)),
        ),
    }
    for name, (products, call) in calls.items():
        with Ran() as ran:
            out = call(getattr(ON_CPU, name))
        assert_close(out, call(getattr(Parts(), name)), **CLOSE)
        assert (ran.by_onednn, ran.by_torch) == (products, 0), name


def into(shape: Any, fill: Any) -> Tensor:
    out = torch.full(shape, torch.nan)
    fill(out)
    return out
