"""Which parts a device gets, and which layers `--compile` compiles beside our kernels; the kernels: tests/kernels."""

from importlib.util import find_spec
from pathlib import Path

import peft
import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from clear_dist import kernels
from clear_dist.engine.fused import Fused, called, choose_parts, is_plain, unless_plain
from clear_dist.engine.on_cpu import ON_CPU
from clear_dist.weights.quantised import to_int8


def feed_forward(*, eight_bits: bool) -> nn.Module:
    layer = FeedForward(8, activation_fn="gelu-approximate").requires_grad_(False)
    if eight_bits:
        to_int8(layer, ["net.2"])
    return layer


def with_lora() -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    return peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(8, 8)))[0]


@pytest.mark.parametrize(
    ("layer", "compiled"),
    [
        (nn.Linear(8, 8), False),
        (feed_forward(eight_bits=False), False),
        (feed_forward(eight_bits=True), True),
        (with_lora(), True),
    ],
    ids=["linear", "mlp", "8 bits in it", "lora"],
)
def test_layers_in_which_something_can_be_fused_are_compiled(layer: nn.Module, compiled: bool) -> None:
    seen = []

    def graph(layer: nn.Module, x: Tensor) -> Tensor:
        seen.append(layer)
        return layer(x)

    x = torch.randn(1, 5, 8)
    with torch.no_grad():
        assert torch.equal(unless_plain(graph)(layer, x[:, 1:4]), layer(x[:, 1:4]))
    assert seen == [layer] * compiled


def test_a_layer_with_hooks_is_called() -> None:
    layer, x, out = nn.Linear(8, 8), torch.randn(1, 3, 8), torch.empty(1, 3, 2, 4)
    with torch.no_grad():
        Fused().project(layer, x, out)
        assert is_plain(layer) and torch.equal(out.flatten(2), layer(x))
        layer.register_forward_hook(lambda layer, given, output: output + 1)
        Fused().project(layer, x, out)
        assert not is_plain(layer) and torch.equal(out.flatten(2), layer(x))


def test_a_layer_under_autocast_is_called() -> None:
    """What comes from a product before it is in 16 bits, weights are not."""
    layer, x = nn.Linear(8, 8), torch.randn(1, 3, 8).bfloat16()
    out = torch.empty(1, 3, 2, 4, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        Fused().project(layer, x, out)
        assert torch.equal(out.flatten(2), layer(x))


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is made for Linux only")
def test_kernels_need_a_c_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Triton builds their launchers with it; slim containers have none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    usable = kernels.usable.__wrapped__
    assert not usable("cuda")
    for name in ("gcc", "clang"):
        (tmp_path / name).touch(0o755)
        assert usable("cuda")
        monkeypatch.setenv("CC", str(tmp_path / "missing"))
        assert not usable("cuda")
        monkeypatch.setenv("CC", name)
        assert usable("cuda")
        monkeypatch.delenv("CC")
        (tmp_path / name).unlink()


def test_kernels_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "usable", lambda device_type: device_type == "cuda")
    assert choose_parts("cpu", compile=False) is ON_CPU
    for compile in (False, True):
        fused = choose_parts("cuda", compile=compile).modulate.__self__
        assert isinstance(fused, Fused) and (fused.call is called) != compile
