"""What else a LoRA's file may hold than two matrices for a layer, and what is told once it is loaded."""

import json
import math
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import save_file

from clear_dist.cards.folder import read_folder
from clear_dist.families.cards import CARDS
from clear_dist.options import Options, Refusal
from clear_dist.request.lora import compare_loras
from clear_dist.request.request import Lora
from clear_dist.weights.lora import load_loras
from tests.tiny_lora import changes, draw, make_lora, put_on, require_equal
from tests.weights.test_lora_files import model, pipe

__all__ = ["model", "pipe"]

DOUBLE = "transformer_blocks.0"


def test_several_add_up(model: Path, pipe: FluxPipeline, tmp_path: Path) -> None:
    files, expected = [], torch.zeros(())
    torch.manual_seed(2)
    for number, name in enumerate(("img_in", "x_embedder", "lora_unet_img_in")):
        down, up = draw(2 + number, 64), draw(32, 2 + number)
        file = tmp_path / f"{number}.safetensors"
        save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, file)
        files.append(Lora(source=str(file), weight=number - 0.5))
        expected = expected + (number - 0.5) * up @ down
    compare_loras(files, read_folder(model, CARDS), CARDS, Options())
    load_loras(pipe, files, CARDS)
    require_equal(changes(pipe.transformer), {"x_embedder": expected})


def test_biases(model: Path, pipe: FluxPipeline, tmp_path: Path) -> None:
    """peft's are scaled as B is; those beside a LoRA (ComfyUI's diff_b) are scaled by the LoRA's weight alone."""
    torch.manual_seed(5)
    halves = {name: (draw(2, 32), draw(32, 2)) for name in ("q", "k", "v")}
    tensors = {
        f"{DOUBLE}.attn.to_{name}.lora_{letter}.weight": x
        for name, pair in halves.items()
        for letter, x in zip("AB", pair, strict=True)
    }
    tensors |= {f"{DOUBLE}.attn.to_{name}.alpha": torch.tensor(1.0) for name in "qk"}
    added, beside = draw(32), draw(32)
    tensors |= {f"{DOUBLE}.attn.to_q.lora_B.bias": added, f"{DOUBLE}.attn.to_k.diff_b": beside}
    put_on(pipe, model, tensors, tmp_path / "style.safetensors", 0.5)
    scales = {"q": 0.25, "k": 0.25, "v": 0.5}
    expected = {f"{DOUBLE}.attn.to_{name}": scales[name] * up @ down for name, (down, up) in halves.items()}
    biases = {f"{DOUBLE}.attn.to_q.bias": 0.25 * added, f"{DOUBLE}.attn.to_k.bias": 0.5 * beside}
    require_equal(changes(pipe.transformer), expected | biases)


@pytest.mark.parametrize("where", ["within", "beside"])
def test_settings_of_peft_scale(model: Path, pipe: FluxPipeline, tmp_path: Path, where: str) -> None:
    """diffusers writes them into a file, peft beside it."""
    settings = {"r": 4, "lora_alpha": 8, "use_rslora": True, "alpha_pattern": {"to_k": 2}}
    torch.manual_seed(6)
    halves = {name: (draw(4, 32), draw(32, 4)) for name in ("q", "k")}
    prefix = {"within": "transformer", "beside": "base_model.model"}[where]
    tensors = {
        f"{prefix}.{DOUBLE}.attn.to_{name}.lora_{letter}.weight": x
        for name, pair in halves.items()
        for letter, x in zip("AB", pair, strict=True)
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    named = {f"transformer.{name}": value for name, value in settings.items()}
    metadata = {"lora_adapter_metadata": json.dumps(named)} if where == "within" else {}
    file = tmp_path / ("style.safetensors" if where == "within" else "adapter_model.safetensors")
    put_on(pipe, model, tensors, file, **metadata)
    scales = {"q": 8 / math.sqrt(4), "k": 2 / math.sqrt(4)}
    require_equal(
        changes(pipe.transformer),
        {f"{DOUBLE}.attn.to_{name}": scales[name] * up @ down for name, (down, up) in halves.items()},
    )


@pytest.mark.parametrize("alpha", ["NaN", "1e999", None])
def test_scales_that_are_none(model: Path, pipe: FluxPipeline, tmp_path: Path, alpha: str | None) -> None:
    """Settings may be missing, too: peft's files have their scale there alone."""
    if alpha is not None:
        (tmp_path / "adapter_config.json").write_text(f'{{"lora_alpha": {alpha}}}')
    why = (
        "settings of a LoRA must be peft's"
        if alpha
        else r"must have adapter_config\.json beside it, which has its scale"
    )
    with pytest.raises(Refusal, match=why):
        put_on(pipe, model, make_lora(pipe.transformer, seed=1), tmp_path / "adapter_model.safetensors")


def test_a_layer_that_peft_passes_over_is_told(model: Path, pipe: FluxPipeline, tmp_path: Path) -> None:
    tensors = make_lora(pipe.transformer, seed=1)
    add = pipe.transformer.add_adapter

    def add_some(config: Any, name: str) -> None:
        add(peft.LoraConfig(r=3, lora_alpha=3, target_modules=["to_q", "to_k"]), name)

    pipe.transformer.add_adapter = add_some
    count = sum(".lora_A." in name for name in tensors)
    with pytest.raises(
        Refusal, match=rf"style\.safetensors must adapt {count} layers of the transformer, and peft did"
    ):
        put_on(pipe, model, tensors, tmp_path / "style.safetensors")


def test_numbers_that_are_not_finite_are_told(model: Path, pipe: FluxPipeline, tmp_path: Path) -> None:
    tensors = make_lora(pipe.transformer, seed=1)
    name = "transformer.x_embedder.lora_B.weight"
    tensors[name][3, 1] = math.inf
    with pytest.raises(Refusal, match=re.escape(f"must hold finite numbers, got NaN or infinity in {name} of")):
        put_on(pipe, model, tensors, tmp_path / "style.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_narrower_numbers(model: Path, pipe: FluxPipeline, tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    down, up = draw(2, 64).to(dtype), draw(32, 2).to(dtype)
    put_on(pipe, model, {"img_in.lora_A.weight": down, "img_in.lora_B.weight": up}, tmp_path / "style.safetensors")
    require_equal(changes(pipe.transformer), {"x_embedder": up.float() @ down.float()})
