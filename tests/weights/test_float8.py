"""Linear layers in float8, on the CPU, whose product serves to test them; and where they are refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clear_dist.families.flux.transformer import Flux
from clear_dist.parallelize import parallelize
from clear_dist.weights.quantised import Float8Linear, to_float8, why_not_float8
from tests.test_parallelize import relative_error, run
from tests.tiny import make_tiny_pipeline
from tests.weights.test_hoisted_lora import adapt

EXACT: dict[str, Any] = {"window": 4, "text_attention": "exact"}


def rounded(rows: Tensor) -> Tensor:
    """4 significant bits, once a row's largest number is 448; subnormal below 2^-6."""
    scale = rows.double().abs().amax(dim=-1, keepdim=True).clamp_min(1e-30) / 448
    x = rows.double() / scale
    exponent = torch.floor(torch.log2(x.abs().clamp_min(2.0**-6)))
    step = 2.0 ** (exponent - 3)
    return torch.round(x / step) * step * scale


class Emulated(nn.Module):
    """A linear layer of rounded numbers, in float64."""

    def __init__(self, stock: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = rounded(stock.weight), stock.bias.double()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(rounded(x), self.weight, self.bias).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (2, 5), (1, 3, 2)])
def test_a_layer(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = nn.Linear(48, 32).to(dtype).requires_grad_(False)
    x = torch.randn(*shape, 48).to(dtype) * torch.logspace(-3, 3, shape[-1])[:, None].to(dtype)
    x[..., 0, :] = 0
    got = Float8Linear(layer)(x)
    assert (got.shape, got.dtype) == ((*shape, 32), dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative_error(got.double(), Emulated(layer)(x.double())) < tolerance
    assert 1e-3 < relative_error(got.float(), layer(x).float()) < 0.1


def quantised(most: int | None = None) -> Any:
    pipe = make_tiny_pipeline()
    to_float8(pipe.transformer, Flux(pipe.transformer).products[:most])
    return pipe


def test_the_layers_of_all_blocks_and_no_others() -> None:
    transformer = quantised().transformer
    kept = [name for name, layer in transformer.named_modules() if type(layer) is nn.Linear]
    adaptive = {f"{name}.linear" for name in Flux(transformer).modulated}
    outside = {"context_embedder", "x_embedder", "proj_out"}
    assert {name for name in kept if not name.startswith("time_text_embed.")} == adaptive | outside
    layers = [layer for layer in transformer.modules() if isinstance(layer, Float8Linear)]
    assert len(layers) == 12 + 5
    assert all(layer.weight.dtype == torch.uint8 for layer in layers)


@pytest.mark.parametrize("hoist", [False, True])
def test_on_stripes(hoist: bool) -> None:
    ours, emulated = quantised(), make_tiny_pipeline()
    for name in Flux(emulated.transformer).products:
        emulated.transformer.set_submodule(name, Emulated(emulated.transformer.get_submodule(name)))
    handles = [parallelize(pipe, hoist_modulation=hoist, **EXACT) for pipe in (ours, emulated)]
    first = [run(pipe, steps=1) for pipe in (ours, emulated)]
    for handle in handles:
        handle.undo()
    assert relative_error(*first) < 1e-3
    assert relative_error(first[0], run_stock()) > 1e-2


def run_stock() -> Tensor:
    pipe = make_tiny_pipeline()
    handle = parallelize(pipe, **EXACT)
    latents = run(pipe, steps=1)
    handle.undo()
    return latents


def test_lora_comes_after() -> None:
    pipe = make_tiny_pipeline()
    adapt(pipe, targets=["to_q"])
    with pytest.raises(ValueError, match=r"plain linear layers, got a Linear for .*to_q; load LoRA after parallelize"):
        to_float8(pipe.transformer, Flux(pipe.transformer).products)
    assert not [layer for layer in pipe.transformer.modules() if isinstance(layer, Float8Linear)]
    pipe = quantised()
    plain = run(pipe, steps=1)
    adapt(pipe, targets=["to_q"])
    with_lora = run(pipe, steps=1)
    stock = make_tiny_pipeline()
    adapt(stock, targets=["to_q"])
    assert relative_error(with_lora, plain) > 3 * relative_error(with_lora, run(stock, steps=1))


def test_where_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="float8 needs a CUDA GPU, got cpu; nearest: float8=False"):
        parallelize(make_tiny_pipeline(), float8=True, **EXACT)
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert why_not_float8(gpu, torch.bfloat16) == "a GPU of compute capability 8.9 or higher, got 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert why_not_float8(gpu, torch.float16) == "bfloat16 for all that is not float8, got torch.float16"
    assert why_not_float8(gpu, torch.bfloat16) is None
