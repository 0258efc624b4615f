"""Weights of Z-Image changed in each way that there is, late halos, and plans, on any number of ranks."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from safetensors.torch import save_file
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.engine import parts
from clear_dist.families.z_image.card import ZImageShape
from clear_dist.parallelize import parallelize
from clear_dist.weights.clear import load_clear_weights
from tests.families.tiny import save_pipeline
from tests.families.z_image.oracle import Dense, DensePooled, Stale, layers_of, put
from tests.families.z_image.test_transformer import PADDED, WHOLE, run
from tests.families.z_image.tiny import make_tiny_z_image
from tests.ranks import run_ranks
from tests.test_parallelize import relative_error
from tests.tiny_lora import add_lora, put_on

EXACT: dict[str, Any] = {"window": 4, "text_attention": "exact"}


def latents(group: Group, settings: dict[str, Any], sizes: list[tuple[int, int]]) -> list[Tensor]:
    pipe = make_tiny_z_image()
    parallelize(pipe, group=group, **settings)
    return [run(pipe, size, steps=4) for size in sizes]


@pytest.mark.parametrize(("settings", "bound"), [({"shard_weights": True}, 1e-5), ({"int8": True}, 1e-4)])
def test_weights_in_shards_and_in_8_bits(settings: dict[str, Any], bound: float) -> None:
    """On three ranks as on one: shards change nothing, 8 bits change both alike."""
    (expected,) = run_ranks(latents, 1, EXACT | settings, [PADDED])
    for (found,) in run_ranks(latents, 3, EXACT | settings, [PADDED]):
        assert relative_error(found, expected[0]) < bound
    assert 1e-3 < relative_error(expected[0], windowed(PADDED)) < 0.2 or "int8" not in settings


@cache
def windowed(size: tuple[int, int]) -> Tensor:
    pipe = make_tiny_z_image()
    put(pipe, Dense, *size, 4)
    return run(pipe, size, steps=4)


@pytest.mark.parametrize("size", [2, 3])
def test_late_halos(size: int) -> None:
    """Halos are the wider picture's columns."""
    settings = EXACT | {"schedule": "stale", "warmup_steps": 2}
    for found in run_ranks(latents, size, settings, [PADDED, WHOLE]):
        for grid, mine in zip((PADDED, WHOLE), found, strict=True):
            pipe = make_tiny_z_image()
            put(pipe, Stale, *grid, 4, size, average=False, warmup=2, by_columns=grid == WHOLE)
            expected = run(pipe, grid, steps=4)
            assert relative_error(mine, expected) < 1e-4
            assert relative_error(expected, windowed(grid)) > 1e-4, "halos do lag"


def make_checkpoint(file: Path, factor: int) -> Path:
    shape = ZImageShape.of(make_tiny_z_image().transformer.config, "here")
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(*size, generator=generator) / (3.0 if "spatial" in name else size[-1] ** 0.5)
        for name, size in shape.clear_tensors(factor).items()
    }
    save_file(tensors, file)
    return file


def pooled(group: Group, file: str) -> list[Tensor]:
    pipe = make_tiny_z_image()
    parallelize(pipe, group=group, clear_weights=file, **EXACT)
    return [run(pipe, size) for size in POOLED]


POOLED = [(14, 10), (8, 12)]
"""In units of two tokens, with 20 tokens of padding and with none; the second one is cut by columns."""


@pytest.mark.parametrize("size", [1, 3])
def test_down_sampled_keys(size: int, tmp_path: Path) -> None:
    """In the blocks that see the caption; refiners of the image alone have none."""
    file = make_checkpoint(tmp_path / "clear_local_4_down_2.safetensors", 2)
    pipe, expected = make_tiny_z_image(), []
    spatial = load_clear_weights(pipe.transformer, file).pooling
    assert spatial is not None
    for height, width in POOLED:
        put(pipe, Dense, height, width, 4)
        for index, (name, layer) in enumerate(layers_of(pipe.transformer).items()):
            if name.startswith("layers"):
                processor = DensePooled(height, width, 4)
                number = index - len(pipe.transformer.noise_refiner)
                processor.height, processor.weight = height, spatial.weights[number][None, None, None, :, None, :, None]
                layer.set_processor(processor)
        expected.append(run(pipe, (height, width)))
    for found in run_ranks(pooled, size, str(file)):
        for mine, theirs in zip(found, expected, strict=True):
            assert relative_error(mine, theirs) < 1e-4


@pytest.mark.parametrize("spelling", ["diffusers", "comfy", "kohya"])
def test_lora_of_each_spelling(spelling: str, tmp_path: Path) -> None:
    """Queries, keys and values are one layer in the original names; alpha is half the rank."""
    folder = save_pipeline(make_tiny_z_image(), tmp_path / "model")
    generator = torch.Generator().manual_seed(4)
    block, width = "layers.1", 32
    down, up = torch.randn(2, width, generator=generator), torch.randn(3 * width, 2, generator=generator)
    names = [f"transformer.{block}.attention.{name}" for name in ("to_q", "to_k", "to_v")]
    plain = {f"{name}.lora_A.weight": down.clone() for name in names}
    plain |= {f"{name}.lora_B.weight": part for name, part in zip(names, (0.5 * up).split(width), strict=True)}
    files: dict[str, dict[str, Tensor]] = {
        "diffusers": plain,
        "comfy": {
            f"diffusion_model.{block}.attention.qkv.lora_A.weight": down,
            f"diffusion_model.{block}.attention.qkv.lora_B.weight": 0.5 * up,
        },
        "kohya": {
            "lora_unet_layers_1_attention_qkv.lora_down.weight": down,
            "lora_unet_layers_1_attention_qkv.lora_up.weight": up,
            "lora_unet_layers_1_attention_qkv.alpha": torch.tensor(1.0),
        },
    }
    pipe, expected = make_tiny_z_image(), make_tiny_z_image()
    put_on(pipe, folder, files[spelling], tmp_path / "lora.safetensors", weight=0.7)
    add_lora(expected.transformer, plain, weight=0.7)
    put(expected, Dense, *PADDED, 4)
    handle = parallelize(pipe, **EXACT)
    assert relative_error(run(pipe, PADDED), run(expected, PADDED)) < 1e-4
    handle.undo()


@pytest.mark.parametrize("most_tokens", [100, 30])
def test_chunks_change_no_more_than_the_last_bits(most_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of projections, which stop between text and image too, and of the wider states between them."""
    pipe = make_tiny_z_image()
    handle = parallelize(pipe, **EXACT)
    whole = run(pipe, PADDED, guidance=3.0)
    monkeypatch.setattr(parts, "MOST_TOKENS", most_tokens)
    assert relative_error(run(pipe, PADDED, guidance=3.0), whole) < 1e-5
    handle.undo()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_compute_what_diffusers_blocks_do(dtype: torch.dtype) -> None:
    """To the bit by the same products. Hooks that were on a block before hold diffusers' forward with the processor."""
    ours, theirs = (make_tiny_z_image().to(dtype) for _ in range(2))
    for block in (*theirs.transformer.noise_refiner, *theirs.transformer.layers):
        add_hook_to_module(block, ModelHook())
    handles = [parallelize(pipe, **EXACT) for pipe in (ours, theirs)]
    with torch.backends.mkldnn.flags(enabled=dtype != torch.float32):
        assert torch.equal(run(ours, PADDED), run(theirs, PADDED))
    assert relative_error(run(ours, PADDED), run(theirs, PADDED)) < 1e-6
    for handle in handles:
        handle.undo()
