"""CLEAR's weights, LoRA and eight bits on SD3's stripes, and the schedules and text attentions that are not exact."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clear_dist.cards.folder import find_model
from clear_dist.comm.group import Group
from clear_dist.families.cards import CARDS
from clear_dist.families.sd3.card import SD3Shape
from clear_dist.options import Options, Refusal
from clear_dist.parallelize import parallelize
from clear_dist.request.lora import compare_loras
from clear_dist.request.request import Lora
from clear_dist.weights.lora import load_loras
from tests.families.sd3.oracle import DenseProcessor
from tests.families.sd3.test_stripes import draw
from tests.families.sd3.tiny import Kind, make_tiny_pipeline
from tests.oracle import softmax_attention
from tests.pooled_oracle import pooled
from tests.ranks import run_ranks
from tests.stale_oracle import stripes_of
from tests.test_parallelize import relative_error
from tests.tiny_lora import add_lora, make_lora

ROWS, COLUMNS, RADIUS, FACTOR, WEIGHT = 8, 6, 3, 2, 0.7
small = partial(draw, rows=ROWS, columns=COLUMNS)


def make_clear_weights(pipe: Any, file: Path, down_factor: int) -> Path:
    """As the official files are: the image side of each layer, spatial weights where the text is seen."""
    generator = torch.Generator().manual_seed(1)
    shapes = SD3Shape.of(pipe.transformer.config, "config.json").clear_tensors(down_factor)
    tensors = {name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    save_file({n: x.abs() * 3 / down_factor if "spatial" in n else x for n, x in tensors.items()}, file)
    return file


class Pooled(DenseProcessor):
    """Image queries that see the text see pooled keys too."""

    weight: Tensor

    def attend_image(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        tokens = len(self.seen)
        if key.shape[1] == tokens:
            return super().attend_image(query, key, value, seen)
        few = [pooled(x[:, :tokens], self.weight, ROWS, COLUMNS) for x in (key, value)]
        everything = torch.ones(len(seen), few[0].shape[1], dtype=torch.bool)
        key, value = (torch.cat(pair, dim=1) for pair in zip((key.double(), value.double()), few, strict=True))
        return softmax_attention(query.double(), key, value, torch.cat([seen, everything], dim=1)).to(query.dtype)


def with_clear(file: Path, kind: Kind) -> Tensor:
    """By unmodified diffusers with the file's tensors."""
    pipe, tensors = make_tiny_pipeline(kind), load_file(file)
    own = {name: x for name, x in tensors.items() if "spatial_weight" not in name}
    assert not pipe.transformer.load_state_dict(own, strict=False).unexpected_keys
    processors = {}
    for name in pipe.transformer.attn_processors:
        processors[name] = processor = Pooled(ROWS, COLUMNS, RADIUS)
        processor.weight = tensors.get(f"{name}.spatial_weight", torch.zeros(()))
    pipe.transformer.set_attn_processor(processors)
    return small(pipe)


def on_stripes(group: Group, loras: list[Lora]) -> dict[str, Tensor]:
    found = {}
    for name, options in {
        "average": {"window": RADIUS},
        "stale": {"window": RADIUS, "text_attention": "exact", "schedule": "stale", "warmup_steps": 1},
        "lora": {"window": "full", "shard_weights": True, "hoist_modulation": True},
        "int8": {"window": "full", "int8": True, "text_tokens": "sharded"},
    }.items():
        pipe = make_tiny_pipeline("medium")
        parallelize(pipe, group=group, **options)
        load_loras(pipe, loras if name == "lora" else [], CARDS)
        found[name] = small(pipe, steps=3)
    return found


def original_names(style: dict[str, Tensor], file: Path) -> Path:
    """A part of a LoRA by Stability AI's names: text's queries, keys and values, and the last modulation."""
    generator = torch.Generator().manual_seed(11)
    down, up = torch.randn(3, 32, generator=generator) / 6, torch.randn(96, 3, generator=generator)
    parts = zip(("add_q_proj", "add_k_proj", "add_v_proj"), up.split(32), strict=True)
    for name, part in parts:
        layer = f"transformer.transformer_blocks.0.attn.{name}"
        style |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": part}
    swapped = torch.randn(64, 3, generator=generator)
    style |= {"transformer.norm_out.linear.lora_A.weight": down, "transformer.norm_out.linear.lora_B.weight": swapped}
    prefix = "diffusion_model."
    save_file(
        {
            f"{prefix}joint_blocks.0.context_block.attn.qkv.lora_A.weight": down,
            f"{prefix}joint_blocks.0.context_block.attn.qkv.lora_B.weight": up,
            f"{prefix}final_layer.adaLN_modulation.1.lora_A.weight": down.clone(),
            f"{prefix}final_layer.adaLN_modulation.1.lora_B.weight": torch.cat(swapped.chunk(2)[::-1]),
        },
        file,
    )
    return file


@pytest.mark.parametrize("size", [1, 2, 3])
def test_weights_and_schedules(size: int, tmp_path: Path) -> None:
    stock = make_tiny_pipeline("medium")
    theirs: dict[str, Tensor] = {}
    style = make_lora(stock.transformer, seed=3)
    save_file(style, tmp_path / "diffusers.safetensors")
    loras = [Lora(source=str(tmp_path / "diffusers.safetensors"), weight=WEIGHT)]
    loras.append(Lora(source=str(original_names(theirs, tmp_path / "original.safetensors")), weight=WEIGHT))
    unchanged = small(stock, steps=3)
    for tensors in (style, theirs):
        add_lora(stock.transformer, tensors, WEIGHT)
    expected = {"lora": small(stock, steps=3)}
    stock = make_tiny_pipeline("medium")
    stock.transformer.set_attn_processor(DenseProcessor(ROWS, COLUMNS, RADIUS))
    exact = small(stock, steps=3)
    stock.transformer.set_attn_processor(DenseProcessor(ROWS, COLUMNS, RADIUS, stripes_of(ROWS, size)))
    expected["average"] = small(stock, steps=3)
    found = run_ranks(on_stripes, size, loras)
    for each in found:
        assert relative_error(each["average"], expected["average"]) < 1e-4
        assert relative_error(each["lora"], expected["lora"]) < 1e-4
        assert 0 < relative_error(each["int8"], unchanged) < 0.1
        assert torch.equal(each["stale"], found[0]["stale"])
        late = relative_error(each["stale"], exact)
        assert late < 1e-4 if size == 1 else 1e-4 < late < 1
    assert relative_error(expected["lora"], unchanged) > 1e-2


@pytest.mark.parametrize("size", [1, 2, 3])
def test_clear_weights_with_down_sampled_keys(size: int, tmp_path: Path) -> None:
    clear = make_clear_weights(make_tiny_pipeline("medium"), tmp_path / "clear_local_3_down_2.safetensors", FACTOR)
    for found in run_ranks(with_weights, size, clear):
        for latents in found:
            assert relative_error(latents, with_clear(clear, "medium")) < 1e-4


def with_weights(group: Group, clear: Path) -> list[Tensor]:
    found = []
    for cut in ("rows", "columns"):
        pipe = make_tiny_pipeline("medium")
        parallelize(pipe, group=group, clear_weights=clear, text_attention="exact", cut=cut)
        found.append(small(pipe))
    return found


def test_a_lora_of_another_family_is_refused(tmp_path: Path) -> None:
    save_file(
        {f"transformer.single_transformer_blocks.0.proj_mlp.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"},
        tmp_path / "other.safetensors",
    )
    facts = find_model("sd3.5-large", CARDS, has_cuda=False)
    with pytest.raises(Refusal, match=r"adapts .*single_transformer_blocks\.0\.proj_mlp, which this model has not"):
        compare_loras([Lora(source=str(tmp_path / "other.safetensors"))], facts, CARDS, Options())
