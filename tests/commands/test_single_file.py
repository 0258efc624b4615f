"""`generate --model FILE`: the same latents, to the bit, as from a folder.

Numbers are stored in bfloat16 and cast: as views of files they would lie at other multiples of 8 bytes than those of a
folder, which MKL rounds otherwise.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clear_dist.cli import main
from tests import original_layout
from tests.families.flux2.tiny import make_tiny_klein
from tests.families.sd3.tiny import make_tiny_pipeline as make_tiny_sd3
from tests.families.tiny import save_pipeline
from tests.families.z_image.tiny import make_tiny_z_image
from tests.tiny import make_clear_weights, make_tiny_pipeline
from tests.tiny_lora import make_lora, save_lora

QUICK = ("--res", "64", "--steps", "2", "--seed", "5", "--device", "cpu", "--max-sequence-length", "16", "--quiet")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def latents(model: Path, *arguments: str) -> Tensor:
    """Latents of a run in this process."""
    file = Path("latents.safetensors")
    with pytest.raises(SystemExit) as ending:
        main(["generate", "a boat", "--model", str(model), *QUICK, "--latents-out", str(file), *arguments])
    assert not ending.value.code
    return load_file(file)["latents"]


def bare(folder: Path, to: Path) -> Path:
    """A copy of the folder without its weights."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    return to


def test_flux_in_comfyui_folders(tmp_path: Path) -> None:
    """Everything beside; on two ranks with CLEAR weights, a LoRA, shards and 8 bits, too."""
    pipe = make_tiny_pipeline().to(torch.bfloat16)
    folder, base = save_pipeline(pipe, tmp_path / "folder"), bare(tmp_path / "folder", tmp_path / "base")
    clear = make_clear_weights(pipe.transformer, tmp_path / "clear_local_2.safetensors")
    lora = save_lora(make_lora(pipe.transformer, seed=1), tmp_path / "style.safetensors")
    models = tmp_path / "ComfyUI" / "models"
    for name in ("diffusion_models", "clip", "text_encoders", "vae"):
        (models / name).mkdir(parents=True)
    file = models / "diffusion_models" / "flux1-dev.safetensors"
    save_file(original_layout.flux(pipe.transformer.state_dict()), file)
    save_file(original_layout.clip(pipe.text_encoder.state_dict()), models / "clip" / "clip_l.safetensors")
    save_file(original_layout.t5(pipe.text_encoder_2.state_dict()), models / "text_encoders" / "t5xxl_fp16.safetensors")
    save_file(original_layout.vae(pipe.vae.state_dict()), models / "vae" / "ae.safetensors")
    for more in (
        (),
        ("--nproc", "2", "--clear-weights", str(clear), "--lora", str(lora), "--text-attention", "exact"),
        ("--nproc", "2", "--clear-weights", str(clear), "--int8", "--shard-weights"),
    ):
        assert torch.equal(latents(file, "--base", str(base), *more), latents(folder, *more)), more


def test_all_of_sd3_in_one_file(tmp_path: Path) -> None:
    pipe = make_tiny_sd3("medium").to(torch.bfloat16)
    folder, base = save_pipeline(pipe, tmp_path / "folder"), bare(tmp_path / "folder", tmp_path / "base")
    parts = {
        "model.diffusion_model.": original_layout.sd3(pipe.transformer.state_dict()),
        "first_stage_model.": original_layout.vae(pipe.vae.state_dict()),
        "text_encoders.clip_l.transformer.": original_layout.clip(pipe.text_encoder.state_dict()),
        "text_encoders.clip_g.transformer.": original_layout.clip(pipe.text_encoder_2.state_dict()),
        "text_encoders.t5xxl.transformer.": original_layout.t5(pipe.text_encoder_3.state_dict()),
    }
    whole = {prefix + name: tensor.clone() for prefix, part in parts.items() for name, tensor in part.items()}
    save_file(whole, file := tmp_path / "sd3.5_medium_incl_clips_t5xxlfp16.safetensors")
    assert torch.equal(latents(file, "--base", str(base)), latents(folder))


@pytest.mark.parametrize("family", ["z-image", "flux2"])
def test_a_file_in_a_folder_takes_the_rest_from_there(tmp_path: Path, family: str) -> None:
    pipe = (make_tiny_z_image() if family == "z-image" else make_tiny_klein()).to(torch.bfloat16)
    to_original = original_layout.z_image if family == "z-image" else original_layout.flux
    folder = save_pipeline(pipe, tmp_path / "folder")
    expected = latents(folder)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    save_file(to_original(pipe.transformer.state_dict()), file := folder / "original.safetensors")
    assert torch.equal(latents(file), expected)
