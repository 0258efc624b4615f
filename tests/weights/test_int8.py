"""Linear layers with weights of 8 bits: what they compute, what they hold, and where they are refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clear_dist.comm.group import Group
from clear_dist.engine import parts
from clear_dist.engine.parts import Parts
from clear_dist.engine.striped import require_striped
from clear_dist.families.flux.transformer import Flux
from clear_dist.parallelize import parallelize
from clear_dist.weights.quantised import Int8Linear, to_int8
from tests.ranks import run_ranks
from tests.test_parallelize import relative_error, run
from tests.tiny import make_tiny_pipeline
from tests.weights.test_hoisted_lora import adapt

EXACT: dict[str, Any] = {"window": 4, "text_attention": "exact"}


def single(x: Tensor) -> Tensor:
    """What float32 keeps of float64."""
    return x.float().double()


class Emulated(nn.Module):
    """A linear layer whose rows are whole numbers times a step, 127.5 steps the largest, in float64."""

    def __init__(self, stock: nn.Linear) -> None:
        super().__init__()
        weight = stock.weight.detach().double()
        step = single(weight.abs().amax(dim=1, keepdim=True) / 127.5)
        steps = single(weight * single(1 / step)).round().clamp(-128, 127)
        self.weight, self.bias = steps * step, stock.bias.double()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.double(), self.weight, self.bias).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7,), (2, 5), (1, 3, 2)])
def test_a_layer(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(48, 32).to(dtype).requires_grad_(False)})
    with torch.no_grad():  # rows of very different size
        model["layer"].weight *= torch.logspace(-2, 2, 32)[:, None].to(dtype)
    layer, x = model["layer"], torch.randn(*shape, 48).to(dtype)
    exact, emulated = layer(x), Emulated(layer)
    step = layer.weight.float().abs().amax(dim=1, keepdim=True) / 127.5
    assert (emulated.weight - layer.weight).div(step).abs().max() < 0.501, "rounded to the nearest of 256 numbers"
    to_int8(model, ["layer"])
    got = model["layer"](x)
    assert (got.shape, got.dtype) == ((*shape, 32), dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    assert relative_error(got.double(), emulated(x).double()) < tolerance
    assert 1e-3 < relative_error(got.float(), exact.float()) < 2e-2
    assert model["layer"].weight.dtype == torch.int8


def quantised(most: int | None = None, **options: int) -> Any:
    pipe = make_tiny_pipeline(**options)
    to_int8(pipe.transformer, Flux(pipe.transformer).products[:most])
    return pipe


def test_the_layers_of_all_blocks_and_no_others() -> None:
    stock, transformer = make_tiny_pipeline().transformer, quantised().transformer
    kept = [name for name, layer in transformer.named_modules() if type(layer) is nn.Linear]
    adaptive = {f"{name}.linear" for name in Flux(transformer).modulated}
    outside = {"context_embedder", "x_embedder", "proj_out"}
    assert {name for name in kept if not name.startswith("time_text_embed.")} == adaptive | outside
    layers = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, Int8Linear)}
    assert len(layers) == 12 + 5
    # One byte for four, and a scale in float32 for each row.
    stock_layers = [stock.get_submodule(name) for name in layers]
    fewer = sum(3 * layer.weight.numel() - 4 * layer.out_features for layer in stock_layers)
    assert bytes_of(stock) - bytes_of(transformer) == fewer


def bytes_of(module: nn.Module) -> int:
    return sum(x.nbytes for x in (*module.parameters(), *module.buffers()))


def test_on_stripes() -> None:
    ours, emulated, stock = make_tiny_pipeline(), make_tiny_pipeline(), make_tiny_pipeline()
    for name in Flux(emulated.transformer).products:
        emulated.transformer.set_submodule(name, Emulated(emulated.transformer.get_submodule(name)))
    latents = []
    for pipe, int8 in ((ours, True), (emulated, False), (stock, False)):
        handle = parallelize(pipe, int8=int8, **EXACT)
        latents.append(run(pipe))
        handle.undo()
    assert relative_error(latents[0], latents[1]) < 1e-4
    assert 1e-3 < relative_error(latents[0], latents[2]) < 0.1


SETTINGS: list[dict[str, Any]] = [
    {},
    {"hoist_modulation": True},
    {"shard_weights": True},
    {"shard_weights": True, "hoist_modulation": True},
]


def int8_latents(group: Group, chunk: int) -> list[Tensor]:
    whole_chunk, parts.MOST_TOKENS = parts.MOST_TOKENS, chunk
    latents = []
    for settings in SETTINGS:
        pipe = make_tiny_pipeline()
        handle = parallelize(pipe, group=group, int8=True, **EXACT, **settings)
        latents.append(run(pipe))
        handle.undo()
    parts.MOST_TOKENS = whole_chunk
    return latents


@pytest.mark.parametrize(("size", "chunk"), [(3, 40_960), (2, 20)])
def test_any_number_of_ranks_computes_what_one_does(size: int, chunk: int) -> None:
    """Whole or in chunks of tokens, in shards or not."""
    pipe = quantised()
    handle = parallelize(pipe, **EXACT)
    alone = run(pipe)
    handle.undo()
    for rank_latents in run_ranks(int8_latents, size, chunk):
        for latents in rank_latents:
            assert relative_error(latents, alone) < 1e-4


def test_it_is_compiled_with_the_parts() -> None:
    pipe, plain = quantised(), quantised()
    handles = [parallelize(pipe, **EXACT), parallelize(plain, **EXACT)]
    torch._dynamo.reset()
    require_striped(pipe).parts = Parts.compiled(backend="eager", fullgraph=True)
    assert relative_error(run(pipe), run(plain)) < 1e-5
    torch._dynamo.reset()
    for handle in handles:
        handle.undo()


def test_lora_comes_after() -> None:
    pipe = make_tiny_pipeline()
    adapt(pipe, targets=["to_q"])
    with pytest.raises(ValueError, match=r"int8 needs plain linear layers, got a Linear for .*to_q; load LoRA after"):
        to_int8(pipe.transformer, Flux(pipe.transformer).products)
    assert not [layer for layer in pipe.transformer.modules() if isinstance(layer, Int8Linear)]
    pipe = quantised()
    plain = run(pipe, steps=1)
    adapt(pipe, targets=["to_q"])
    with_lora = run(pipe, steps=1)
    stock = make_tiny_pipeline()
    adapt(stock, targets=["to_q"])
    assert relative_error(with_lora, plain) > 3 * relative_error(with_lora, run(stock, steps=1))


def test_float8_and_int8_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"^either float8 or int8 can be given, got both; leave one out$"):
        parallelize(make_tiny_pipeline(), int8=True, float8=True, **EXACT)
