"""Model folders that are incomplete, damaged or of another kind: refused, before they are loaded where that can be."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from clear_dist.cards.folder import read_folder
from clear_dist.families.cards import CARDS
from clear_dist.families.flux.card import CARD
from clear_dist.families.transformers import adapter_of
from clear_dist.launch.env import Place
from clear_dist.options import Refusal
from clear_dist.request.flags import GenerateFlags
from clear_dist.request.settle import settle
from clear_dist.weights.loading import load_pipeline
from tests.tiny import make_tiny_flux, make_tiny_pipeline

ALONE = Place()
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
INDEX = f"{TRANSFORMER}.index.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_flux(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def retensor(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def split(folder: Path) -> Path:
    """Two files and an index in place of the transformer's one; the second file."""
    whole = folder / TRANSFORMER
    tensors = load_file(whole)
    halves = [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])]
    names = [f"diffusion_pytorch_model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, whole.with_name(name))
    weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    whole.unlink()
    return whole.with_name(names[1])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: shutil.rmtree(f), "there is no"),
    "empty": (lambda f: (shutil.rmtree(f), f.mkdir()), "empty folder"),
    "no index": (lambda f: (f / "model_index.json").unlink(), "model_index.json"),
    "broken index": (lambda f: (f / "model_index.json").write_text("{"), "must be a JSON file"),
    "another pipeline": (
        lambda f: edit(f / "model_index.json", _class_name="StableDiffusionPipeline"),
        "must be a FluxPipeline .*, got StableDiffusionPipeline",
    ),
    "another transformer": (
        lambda f: edit(f / "transformer/config.json", _class_name="SD3Transformer2DModel"),
        "must be FluxTransformer2DModel, got SD3Transformer2DModel",
    ),
    "a transformer that nobody knows": (
        lambda f: edit(f / "model_index.json", transformer=["diffusers", "NoSuchTransformer"]),
        "transformer must be FluxTransformer2DModel, got NoSuchTransformer",
    ),
    "a VAE that nobody knows": (
        lambda f: edit(f / "vae/config.json", _class_name="NoVae"),
        "the class of the vae must be AutoencoderKL, got NoVae",
    ),
    "another use": (lambda f: edit(f / "transformer/config.json", in_channels=384), "must take 64 channels"),
    "no vae": (lambda f: shutil.rmtree(f / "vae"), "must have the folder vae"),
    "no weights": (lambda f: (f / TRANSFORMER).unlink(), f"there is no file .*{TRANSFORMER}"),
    "a link to nothing": (
        lambda f: ((f / TRANSFORMER).unlink(), (f / TRANSFORMER).symlink_to("gone")),
        f"{TRANSFORMER} is a link to nothing; weights must be a safetensors file: download it again",
    ),
    "no text weights": (lambda f: (f / "text_encoder_2/model.safetensors").unlink(), "text_encoder_2"),
    "pickled": (
        lambda f: (f / TRANSFORMER).rename(f / "transformer/diffusion_pytorch_model.bin"),
        "got the pickled file .*diffusion_pytorch_model.bin",
    ),
    "a variant alone": (
        lambda f: (f / TRANSFORMER).rename(f / "transformer/diffusion_pytorch_model.fp16.safetensors"),
        f"no file .*{TRANSFORMER}; nearest: diffusion_pytorch_model.fp16.safetensors",
    ),
    "pickle by another name": (
        lambda f: torch.save({"x": torch.ones(1)}, f / TRANSFORMER),
        f"must be safetensors, got pickle in .*{TRANSFORMER}",
    ),
    "an older pickle": (
        lambda f: (f / TRANSFORMER).write_bytes(pickle.dumps({"x": [1.0] * 100}, protocol=2)),
        f"must be safetensors, got pickle in .*{TRANSFORMER}",
    ),
    "pickled files in the index": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.bin"}}'),
        "got the pickled file .*00001-of-00002.bin",
    ),
    "several files and no index": (
        lambda f: (split(f), (f / INDEX).unlink()),
        f"diffusion_pytorch_model-00001-of-00002.safetensors and no .*{INDEX}",
    ),
    "cut in the data": (lambda f: cut(f / TRANSFORMER, -100), "must have .* bytes by its own header"),
    "cut in the header": (lambda f: cut(f / TRANSFORMER, 100), "complete safetensors file"),
    "nothing in it": (lambda f: cut(f / TRANSFORMER, 0), "complete safetensors file"),
    "other contents": (lambda f: (f / TRANSFORMER).write_text("<html>" * 100), "complete safetensors file"),
    "tensor missing": (
        lambda f: retensor(f / TRANSFORMER, lambda t: t.pop("transformer_blocks.0.attn.to_q.weight")),
        "lacks transformer_blocks.0.attn.to_q.weight",
    ),
    "tensor unexpected": (
        lambda f: retensor(f / TRANSFORMER, lambda t: t.update(extra=torch.zeros(1))),
        "has an unexpected tensor extra",
    ),
    "wrong shape": (
        lambda f: retensor(f / TRANSFORMER, lambda t: t.update({"proj_out.bias": torch.zeros(3)})),
        r"proj_out.bias must have the shape \[64\], got \[3\]",
    ),
    "a file of several missing": (
        lambda f: split(f).unlink(),
        "there is no file .*00002-of-00002.safetensors, which .*index.json names",
    ),
    "a file of several cut": (lambda f: cut(split(f), -100), "00002-of-00002.safetensors must have .* bytes"),
    "index of another kind": (
        lambda f: (f / INDEX).write_text('{"weight_map": ["a"]}'),
        "weight_map in .* must give a file for each tensor",
    ),
    "index that leaves the folder": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "../vae/diffusion_pytorch_model.safetensors"}}'),
        "weight_map in .* must give a file for each tensor",
    ),
    "layers in words": (
        lambda f: edit(f / "transformer/config.json", num_layers="two"),
        'num_layers must be a whole number from 1 to 65536, got "two" in .*config.json; nearest: 19',
    ),
    "layers left out": (lambda f: edit(f / "transformer/config.json", num_layers=None), "num_layers .* got null"),
    "too many layers": (
        lambda f: edit(f / "transformer/config.json", num_layers=10**9),
        "num_layers .* got 1000000000",
    ),
    "channels in words": (lambda f: edit(f / "transformer/config.json", in_channels="64"), 'in_channels .* got "64"'),
    "positions": (
        lambda f: edit(f / "transformer/config.json", axes_dims_rope=[8, 12, 12]),
        r"axes_dims_rope must be .* attention_head_dim, 16, got \[8, 12, 12\]",
    ),
    "one block of the vae": (
        lambda f: edit(f / "vae/config.json", block_out_channels=8),
        "block_out_channels must be a list of numbers, got 8",
    ),
    "no blocks of the vae": (lambda f: edit(f / "vae/config.json", block_out_channels=[]), r"block_out.* got \[\]"),
    "size in words": (lambda f: edit(f / "vae/config.json", sample_size="big"), 'sample_size .* got "big"'),
    "size 0": (lambda f: edit(f / "vae/config.json", sample_size=0), "sample_size .* got 0"),
    "another scheduler": (
        lambda f: edit(f / "scheduler/scheduler_config.json", _class_name="DDIMScheduler"),
        "scheduler must be FlowMatchEulerDiscreteScheduler, got DDIMScheduler",
    ),
    "a shift in words": (
        lambda f: edit(f / "scheduler/scheduler_config.json", shift="three"),
        'shift must be a number above 0, got "three" in .*scheduler_config.json; nearest: 3',
    ),
    "a shift of nothing": (
        lambda f: edit(f / "scheduler/scheduler_config.json", max_shift=0),
        "max_shift must be a number above 0, got 0",
    ),
    "another scheduler's class": (
        lambda f: edit(f / "model_index.json", scheduler=["diffusers", "DDIMScheduler"]),
        "got DDIMScheduler",
    ),
    "no tokens": (
        lambda f: (shutil.rmtree(f / "tokenizer_2"), (f / "tokenizer_2").mkdir()),
        "tokenizer_2 must hold one of tokenizer.json",
    ),
    "broken tokens": (lambda f: (f / "tokenizer/tokenizer.json").write_text("{"), "tokenizer.json must be a JSON file"),
    "tokens without end": (
        lambda f: (f / "tokenizer/tokenizer_config.json").write_text('{"model_max_length": 1e30}'),
        "model_max_length must be a whole number .* nearest: 77",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_models_are_refused(folder: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(Refusal, match=message):
        settle(GenerateFlags(model=str(folder)), ALONE, CARDS)


def test_weights_in_several_files(folder: Path) -> None:
    split(folder)
    assert read_folder(folder, CARDS).token_size == 16


def widen(file: Path, name: str) -> None:
    retensor(file, lambda tensors: tensors.update({name: torch.cat([tensors[name]] * 2)}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: widen(f / "text_encoder/model.safetensors", "final_layer_norm.bias"),
            r"final_layer_norm.bias must have the shape \[16\], got \[32\] in .*text_encoder",
        ),
        (
            lambda f: widen(f / "text_encoder_2/model.safetensors", "encoder.final_layer_norm.weight"),
            r"encoder.final_layer_norm.weight must have the shape \[24\], got \[48\] in .*text_encoder_2",
        ),
        (
            lambda f: widen(f / "vae/diffusion_pytorch_model.safetensors", "decoder.conv_in.bias"),
            r"decoder.conv_in.bias must have the shape \[8\], got \[16\] in .*vae",
        ),
        (
            lambda f: edit(f / "text_encoder/config.json", num_hidden_layers="two"),
            "loaded as CLIPTextModel, and does not",
        ),
        (lambda f: (f / "tokenizer/tokenizer.json").write_text("{}"), "the tokenizers and the scheduler"),
    ],
)
def test_what_only_loading_can_tell(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(Refusal, match=message) as caught:
        load_pipeline(folder, CARD, with_text_encoders=True, dtype=torch.float32, device=torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_long_prompts_are_not_repeated() -> None:
    lines = adapter_of(make_tiny_pipeline()).too_long("a" * 66_000, 512)
    assert len(lines) == 2 and all(len(line) < 200 and line.endswith("...'") for line in lines)
