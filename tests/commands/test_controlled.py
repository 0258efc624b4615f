"""`--controlnet` from the command to the files: pictures are those of diffusers' pipeline."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetPipeline
from PIL import Image
from safetensors.torch import load_file

from clear_dist.cli import main
from tests.drawing.test_control import relative_error
from tests.tiny import make_tiny_flux, make_tiny_pipeline
from tests.tiny_controlnet import make_tiny_controlnet

QUICK = ("--seed", "5", "--device", "cpu", "--max-sequence-length", "16", "--quiet", "--window", "full", "a hill")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_flux(tmp_path_factory.mktemp("model"), sample_size=64)
    make_tiny_controlnet(modes=3).save_pretrained(folder / "net")
    values = np.random.default_rng(3).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    Image.fromarray(values).save(folder / "control.png")
    return folder


def run(command: str, folder: Path, *arguments: str) -> None:
    net = "--controlnet", str(folder / "net"), "--control-mode", "tile"
    with pytest.raises(SystemExit) as ending:
        main([command, *arguments, *QUICK, "--model", str(folder), *net])
    assert ending.value.code in (0, None)


def test_a_picture_is_that_of_the_stock_pipeline(folder: Path, tmp_path: Path) -> None:
    file, image = tmp_path / "drawn.png", folder / "control.png"
    shown = "--control-image", str(image), "--control-scale", "0.7", "--res", "64", "--steps", "2"
    run("generate", folder, *shown, "--output", str(file), "--latents-out", str(tmp_path / "drawn.safetensors"))
    parts = make_tiny_pipeline(sample_size=64).components
    stock = FluxControlNetPipeline(**parts, controlnet=make_tiny_controlnet(modes=3))
    expected = stock(
        "a hill",
        control_image=Image.open(image),
        control_mode=1,
        controlnet_conditioning_scale=0.7,
        height=64,
        width=64,
        num_inference_steps=2,
        guidance_scale=3.5,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).images
    assert relative_error(load_file(tmp_path / "drawn.safetensors")["latents"], expected) < 1e-4
    written = " ".join(map(str, Image.open(file).info.values()))
    assert '"mode": 1' in written and '"source": "net"' in written and str(folder) not in written


def test_upscale_shows_the_picture_itself(folder: Path, tmp_path: Path) -> None:
    """What is shown is the same whether it is named or not, and is not another picture."""
    image, other = folder / "control.png", tmp_path / "other.png"
    Image.new("RGB", (80, 80), "red").save(other)
    drawn = []
    for number, shown in enumerate(((), ("--control-image", str(image)), ("--control-image", str(other)))):
        file = tmp_path / f"{number}.png"
        run("upscale", folder, str(image), *shown, "--res", "128", "--upscale-steps", "1", "--output", str(file))
        drawn.append(np.asarray(Image.open(file)).astype(int))
    assert (drawn[0] == drawn[1]).all() and abs(drawn[0] - drawn[2]).mean() > 1
