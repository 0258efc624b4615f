"""`--lora` on ranks: a picture against weights that it was added to by hand."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.commands.test_generate import generate_on_ranks
from tests.test_parallelize import relative_error
from tests.tiny import make_tiny_flux, make_tiny_pipeline
from tests.tiny_lora import add_lora, as_kohya, make_lora, save_lora

TEXT_LAYERS = re.compile(r".*\.(q_proj|v_proj|fc1)")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_flux(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return make_lora(make_tiny_pipeline().transformer, seed=1)


def test_lora_of_the_text_encoder_too_on_two_ranks(
    model: Path, tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: Any
) -> None:
    """Only rank 0 has a text encoder. A second one is in kohya's format, which halves it by its alpha."""
    monkeypatch.chdir(tmp_path)
    stock = FluxPipeline.from_pretrained(model)
    text = make_lora(stock.text_encoder, seed=2, prefix="text_encoder", layers=TEXT_LAYERS)
    kohya = as_kohya(make_lora(stock.transformer, seed=3), alpha=1.5)
    save_lora(tensors | text, tmp_path / "style.safetensors")
    save_lora(kohya, tmp_path / "kohya.safetensors")
    arguments = (
        "a hill",
        "--window",
        "full",
        "--clear-weights",
        "none",
        "--nproc",
        "2",
        "--latents-out",
        "x.safetensors",
    )
    loras = ("--lora", "style.safetensors:0.5", "--lora", "./kohya.safetensors")
    assert generate_on_ranks(model, *arguments, *loras) == 0

    add_lora(stock.transformer, tensors, 0.5)
    add_lora(stock.text_encoder, text, 0.5, prefix="text_encoder")
    mine = {
        name: x
        for name, x in make_lora(stock.transformer, seed=3).items()
        if re.search(r"\.ff\.|single.*proj_out", name)
    }
    add_lora(stock.transformer, mine, 1.5 / 3)
    stock.set_progress_bar_config(disable=True)
    settings = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 16, "guidance_scale": 3.5}
    generator = torch.Generator().manual_seed(5)
    expected = stock("a hill", **settings, generator=generator, output_type="latent").images
    assert relative_error(load_file("x.safetensors")["latents"], expected) < 1e-4
    with Image.open("clear-dist.png") as picture:
        told = json.loads(picture.text["settings"])["loras"]  # type: ignore[attr-defined]
    assert told == [
        {"source": "style.safetensors", "weight": 0.5, "stages": None},
        {"source": "kohya.safetensors", "weight": 1.0, "stages": None},
    ]
