"""LoRA through the stock pipeline on ranks, against weights that it was added to by hand."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.parallelize import parallelize
from clear_dist.weights.clear import load_clear_weights
from tests.oracle import DenseClearProcessor
from tests.ranks import run_ranks
from tests.test_parallelize import HEIGHT, WIDTH, relative_error, run
from tests.tiny import make_clear_weights, make_tiny_pipeline
from tests.tiny_lora import add_lora, make_lora, save_lora

RADIUS = 4
EXACT: dict[str, Any] = {"window": RADIUS, "text_attention": "exact"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, transformer = tmp_path_factory.mktemp("lora"), make_tiny_pipeline().transformer
    saved = {name: save_lora(made(name), folder / f"{name}.safetensors") for name in "ab"}
    return saved | {"clear": make_clear_weights(transformer, folder / "clear_local_4.safetensors")}


@cache
def made(name: str) -> dict[str, Tensor]:
    return make_lora(make_tiny_pipeline().transformer, seed=ord(name))


def expected(*, a: float = 0.0, b: float = 0.0, clear: Path | None = None) -> Tensor:
    """The unmodified pipeline with a dense processor."""
    pipe = make_tiny_pipeline()
    if clear is not None:
        load_clear_weights(pipe.transformer, clear)
    add_lora(pipe.transformer, made("a"), a)
    add_lora(pipe.transformer, made("b"), b)
    pipe.transformer.set_attn_processor(DenseClearProcessor(HEIGHT, WIDTH, RADIUS))
    return run(pipe)


def load(pipe: FluxPipeline, files: dict[str, Path], *names: str) -> None:
    for name in names:
        pipe.load_lora_weights(str(files[name].parent), weight_name=files[name].name, adapter_name=name)


def used(group: Group, files: dict[str, Path]) -> dict[str, Tensor]:
    """All that the pipeline offers, one after the other, on one pipeline that is on stripes."""
    pipe = make_tiny_pipeline()
    handle = parallelize(pipe, group=group, **EXACT)
    load(pipe, files, "a")
    latents = {"loaded": run(pipe), "scaled": run(pipe, joint_attention_kwargs={"scale": 0.5})}
    load(pipe, files, "b")
    pipe.set_adapters(["a", "b"], [0.5, -0.7])
    latents["two"] = run(pipe)
    pipe.fuse_lora()
    latents["fused"] = run(pipe)
    pipe.unfuse_lora()
    pipe.set_adapters("b")
    latents["other"] = run(pipe)
    pipe.delete_adapters("b")
    pipe.disable_lora()
    latents["off"] = run(pipe)
    pipe.enable_lora()
    handle.undo()
    handle = parallelize(pipe, group=group, **EXACT)
    pipe.set_adapters("a")
    latents["before"] = run(pipe)
    pipe.unload_lora_weights()
    latents["unloaded"] = run(pipe)
    handle.undo()
    handle = parallelize(pipe, group=group, shard_weights=True, **EXACT)
    load(pipe, files, "a")
    latents["in shards"] = run(pipe)
    handle.undo()
    return latents


def test_lora_on_three_ranks_is_what_it_adds_to_the_weights(files: dict[str, Path]) -> None:
    weights: dict[str, dict[str, float]] = {
        "loaded": {"a": 1.0},
        "scaled": {"a": 0.5},
        "two": {"a": 0.5, "b": -0.7},
        "fused": {"a": 0.5, "b": -0.7},
        "other": {"b": 1.0},
        "off": {},
        "before": {"a": 1.0},
        "unloaded": {},
        "in shards": {"a": 1.0},
    }
    oracle = {name: expected(**given) for name, given in weights.items()}
    assert relative_error(oracle["loaded"], oracle["off"]) > 1e-2
    assert relative_error(oracle["loaded"], oracle["scaled"]) > 1e-2
    for latents in run_ranks(used, 3, files):
        assert latents.keys() == weights.keys()
        for name in weights:
            assert relative_error(latents[name], oracle[name]) < 1e-4, name


def with_clear_weights(group: Group, files: dict[str, Path]) -> list[Tensor]:
    """LoRA before CLEAR's weights, and after."""
    results = []
    for before in (True, False):
        pipe = make_tiny_pipeline()
        if before:
            load(pipe, files, "a")
        parallelize(pipe, clear_weights=files["clear"], text_attention="exact", group=group)
        if not before:
            load(pipe, files, "a")
        results.append(run(pipe))
    return results


def test_clear_weights_come_under_lora(files: dict[str, Path]) -> None:
    oracle = expected(a=1.0, clear=files["clear"])
    for results in run_ranks(with_clear_weights, 2, files):
        assert [relative_error(latents, oracle) < 1e-4 for latents in results] == [True, True]


def test_a_fused_lora_would_be_lost_under_clear_weights(files: dict[str, Path]) -> None:
    pipe = make_tiny_pipeline()
    load(pipe, files, "a")
    pipe.fuse_lora()
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.base_layer.weight
    before = weight.clone()
    with pytest.raises(ValueError, match=r"replace .*to_q, a fused LoRA included; call pipe\.unfuse_lora"):
        parallelize(pipe, clear_weights=files["clear"])
    assert torch.equal(weight, before)
    parallelize(pipe, **EXACT).undo()
