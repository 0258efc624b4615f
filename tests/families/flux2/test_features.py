"""Everything that a FLUX.2 on stripes can be combined with: N ranks against oracles in the unmodified pipeline."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import Flux2Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clear_dist.comm.group import Group
from clear_dist.engine import parts
from clear_dist.families.cards import CARDS
from clear_dist.families.flux2.card import DEV, KLEIN, Flux2Shape
from clear_dist.families.flux2.transformer import Flux2
from clear_dist.parallelize import parallelize
from clear_dist.plan.allocated import Allocated
from clear_dist.request.request import Lora
from clear_dist.weights.lora import load_loras
from tests.families.flux.test_blocks import attention_that_only_makes_its_output
from tests.families.flux2.oracle import in_parallel, put_oracle
from tests.families.flux2.test_transformer import BASE, make, run
from tests.families.flux2.test_transformer import DEV as DEV_NAME
from tests.families.flux2.test_transformer import KLEIN as KLEIN_NAME
from tests.families.flux2.tiny import make_tiny_transformer
from tests.pooled_oracle import pool_keys
from tests.put_on import put_on
from tests.ranks import run_ranks
from tests.stale_oracle import emulate
from tests.test_parallelize import relative_error
from tests.tiny import draw_weights
from tests.tiny_lora import add_lora, changes, make_lora, require_equal, save_lora
from tests.weights.test_int8 import single

HEIGHT, WIDTH, RADIUS, STEPS = 12, 8, 3, 3
"""Three units of 4 rows."""
SIZE: dict[str, Any] = {"height": HEIGHT, "width": WIDTH}
EXACT: dict[str, Any] = {"window": RADIUS, "text_attention": "exact"}
LATE: dict[str, Any] = {"schedule": "stale", "warmup_steps": 1}
STALE = [EXACT | LATE, {"window": RADIUS, "text_attention": "average"} | LATE, {"window": "full"} | LATE]
STALE.append(EXACT | LATE | {"cut": "columns"})
WEIGHTS: list[dict[str, Any]] = [
    {"shard_weights": True, "hoist_modulation": True},
    {"offload": True, "hoist_modulation": True, "text_tokens": "sharded"},
    {"shard_weights": True, "text_tokens": "sharded"},
]
LINEAR = re.compile(
    r".*\.(to_[qkv]|to_out(\.0)?|add_[qkv]_proj|to_add_out|to_qkv_mlp_proj|linear(_in|_out)?)|x_embedder"
)


def drawn(group: Group, name: str, cases: list[dict[str, Any]], most_tokens: int, **how: Any) -> list[Tensor]:
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "MOST_TOKENS", most_tokens)
        for case in cases:
            pipe = make(name)
            handle = parallelize(pipe, group=group, **case)
            results.append(run(pipe, name, **SIZE, **how))
            handle.undo()
    return results


@cache
def windows(name: str) -> Tensor:
    pipe = make(name)
    put_oracle(pipe, HEIGHT, WIDTH, RADIUS)
    return run(pipe, name, **SIZE)


@pytest.mark.parametrize("most_tokens", [parts.MOST_TOKENS, 20])
@pytest.mark.parametrize("name", [BASE, DEV_NAME])
def test_weights_elsewhere_and_chunks_change_nothing(name: str, most_tokens: int) -> None:
    cases = [EXACT | case for case in ({}, *WEIGHTS)]
    for results in run_ranks(drawn, 3, name, cases, most_tokens):
        for case, latents in zip(cases, results, strict=True):
            assert relative_error(latents, windows(name)) < 1e-4, case


@pytest.mark.parametrize("name", [KLEIN_NAME, BASE])
def test_stale_halos_are_what_one_process_computes_with_late_neighbours(name: str) -> None:
    for results in run_ranks(drawn, 3, name, STALE, parts.MOST_TOKENS, steps=STEPS):
        for case, latents in zip(STALE, results, strict=True):
            pipe, average = make(name), case.get("text_attention") == "average"
            how: dict[str, Any] = {"window": case["window"], "ranks": 3, "average": average}
            how["by_columns"] = case.get("cut") == "columns"
            emulate(pipe, **SIZE, **how, warmup=1, passes=1 + (name == BASE))
            in_parallel(pipe)
            assert relative_error(latents, run(pipe, name, **SIZE, steps=STEPS)) < 1e-4, case


def make_clear(file: Path, factor: int) -> Path:
    """A random checkpoint of attention's image side, with down-sampled keys."""
    shapes = Flux2Shape.of(make_tiny_transformer().config, "here").clear_tensors(factor)
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith("spatial_weight"):
            tensors[name] = torch.rand(shape, generator=generator) * (3 / factor)
        else:
            tensors[name] = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
    save_file(tensors, file)
    return file


def test_clear_weights_with_down_sampled_keys(tmp_path: Path) -> None:
    file = make_clear(tmp_path / f"clear_local_{RADIUS}_down_4.safetensors", 4)
    tensors, pipe = load_file(file), make(KLEIN_NAME)
    pipe.transformer.load_state_dict({name: x for name, x in tensors.items() if "spatial" not in name}, strict=False)
    pool_keys(pipe, tensors, RADIUS, height=HEIGHT, width=WIDTH)
    in_parallel(pipe)
    expected = run(pipe, KLEIN_NAME, **SIZE)
    assert len([name for name in tensors if "spatial" in name]) == 3, "a weight for each layer"
    for ranks, cut in ((3, "rows"), (2, "columns")):
        case = EXACT | {"clear_weights": file, "cut": cut}
        for (latents,) in run_ranks(drawn, ranks, KLEIN_NAME, [case], parts.MOST_TOKENS):
            assert relative_error(latents, expected) < 1e-4


def adapted(group: Group, file: Path, cases: list[dict[str, Any]]) -> list[Tensor]:
    results = []
    for case in cases:
        pipe = make(KLEIN_NAME)
        handle = parallelize(pipe, group=group, **EXACT, **case)
        load_loras(pipe, [Lora(source=str(file), weight=0.7)], CARDS)
        results.append(run(pipe, KLEIN_NAME, **SIZE))
        handle.undo()
    return results


def test_lora_of_all_layers(tmp_path: Path) -> None:
    pipe = make(KLEIN_NAME)
    tensors = make_lora(pipe.transformer, seed=3, layers=LINEAR)
    adapted_layers = {name.partition(".lora_")[0] for name in tensors}
    assert len(adapted_layers) == 8 + 4 + 2 * 2 + 4 + 1, "double block, its MLPs, single blocks, modulation, embedder"
    add_lora(pipe.transformer, tensors, 0.7)
    put_oracle(pipe, HEIGHT, WIDTH, RADIUS)
    expected = run(pipe, KLEIN_NAME, **SIZE)
    assert relative_error(windows(KLEIN_NAME), expected) > 1e-2
    file = save_lora(tensors, tmp_path / "style.safetensors")
    for results in run_ranks(adapted, 2, file, [{}, {"hoist_modulation": True, "shard_weights": True}]):
        for latents in results:
            assert relative_error(latents, expected) < 1e-4


def test_original_names_of_lora_are_diffusers_names(tmp_path: Path) -> None:
    """Fused queries, keys and values; by ComfyUI's and kohya's prefixes."""
    model = draw_weights(make_tiny_transformer(), torch.Generator().manual_seed(0))
    width, hidden = 32, 96
    outputs = {
        "double_blocks.0.img_attn.qkv": 3 * width,
        "double_blocks.0.txt_attn.proj": width,
        "double_blocks.0.img_mlp.0": 2 * hidden,
        "single_blocks.1.linear1": 3 * width + 2 * hidden,
        "single_stream_modulation.lin": 3 * width,
        "final_layer.adaLN_modulation.1": 2 * width,
    }
    tensors: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    for number, (name, count) in enumerate(outputs.items()):
        down, up = torch.randn(2, width), torch.randn(count, 2)
        prefix = f"lora_unet_{name.replace('.', '_')}" if number % 2 else f"diffusion_model.{name}"
        tensors |= {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up}
        added[name] = up @ down
    file = save_lora(tensors, tmp_path / "style.safetensors")
    pipe = make(KLEIN_NAME)
    pipe.transformer = model
    load_loras(pipe, [Lora(source=str(file), weight=1.0)], CARDS)
    block, single = "transformer_blocks.0", "single_transformer_blocks.1.attn"
    query, key, value = added["double_blocks.0.img_attn.qkv"].chunk(3)
    shift, scale = added["final_layer.adaLN_modulation.1"].chunk(2)
    require_equal(
        changes(model),
        {
            f"{block}.attn.to_q": query,
            f"{block}.attn.to_k": key,
            f"{block}.attn.to_v": value,
            f"{block}.attn.to_add_out": added["double_blocks.0.txt_attn.proj"],
            f"{block}.ff.linear_in": added["double_blocks.0.img_mlp.0"],
            f"{single}.to_qkv_mlp_proj": added["single_blocks.1.linear1"],
            "single_stream_modulation.linear": added["single_stream_modulation.lin"],
            "norm_out.linear": torch.cat([scale, shift]),
        },
    )


def rounded(model: nn.Module) -> None:
    """Weights of the blocks' products in 256 steps a row, 127.5 steps the largest: a tie, so rounded as float32 does."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and "blocks." in name:
            weight = layer.weight.double()
            step = single(weight.abs().amax(dim=1, keepdim=True) / 127.5)
            layer.weight.copy_(single(weight * single(1 / step)).round().clamp(-128, 127) * step)


@torch.no_grad()
def test_int8_is_rounded_weights() -> None:
    pipe = make(DEV_NAME)
    rounded(pipe.transformer)
    put_oracle(pipe, HEIGHT, WIDTH, RADIUS)
    expected = run(pipe, DEV_NAME, **SIZE)
    assert relative_error(windows(DEV_NAME), expected) > 1e-3
    cases = [EXACT | {"int8": True}, EXACT | {"int8": True, "shard_weights": True}]
    for most_tokens in (parts.MOST_TOKENS, 20):
        for results in run_ranks(drawn, 2, DEV_NAME, cases, most_tokens):
            for latents in results:
                assert relative_error(latents, expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_compute_what_diffusers_blocks_do(dtype: torch.dtype) -> None:
    """Hooks that were on a block before hold diffusers' forward, which calls the processor."""
    ours, theirs = (make(DEV_NAME).to(dtype) for _ in range(2))
    for block in Flux2(theirs.transformer).blocks:
        add_hook_to_module(block, ModelHook())
    handles = [parallelize(pipe, **EXACT) for pipe in (ours, theirs)]
    try:
        found, expected = (run(pipe, DEV_NAME, **SIZE) for pipe in (ours, theirs))
        assert relative_error(found.float(), expected.float()) < {torch.float32: 1e-6}.get(dtype, 2e-2)
    finally:
        for handle in handles:
            handle.undo()


@pytest.mark.parametrize("model", [*KLEIN.hub_models, *DEV.hub_models], ids=lambda model: model.short)
def test_every_tensor_of_the_true_size_is_known(model: Any) -> None:
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel.from_config(model.configs["transformer"])
    expected = {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
    assert model.shape.tensors() == expected
    billions = {"klein-4b": 3.88, "klein-9b": 9.08, "dev": 32.22}[
        model.short.removeprefix("flux2-").replace("base-", "")
    ]
    assert sum(x.numel() for x in transformer.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize(("pixels", "most"), [(4096, 13.0), (8192, 7.0), (16384, 6.5)])
def test_memory_of_a_step(pixels: int, most: float) -> None:
    """Klein 4B in bfloat16 on one GPU, counted in tensors of all tokens; diffusers' own blocks take 21.3 of them."""
    tokens = (pixels // 16) ** 2
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel.from_config(KLEIN.hub_models[0].configs["transformer"])
    family = Flux2(transformer.to(torch.bfloat16))
    put_on(family, attention_that_only_makes_its_output())
    call = family.empty_inputs((pixels // 16, pixels // 16), images=1, text_tokens=512)
    with torch.no_grad(), Allocated() as allocated:
        transformer(**call)
    assert 5 < allocated.peak / (2 * (tokens + 512) * 3072) < most
