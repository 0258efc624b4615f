"""Random LoRA for a tiny FLUX, what it comes to when it is added to the weights by hand, and what was added."""

import math
import re
from pathlib import Path

import torch
from diffusers import FluxPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from clear_dist.cards.folder import read_folder
from clear_dist.families.cards import CARDS
from clear_dist.options import Options
from clear_dist.request.lora import compare_loras
from clear_dist.request.request import Lora
from clear_dist.weights.lora import load_loras

LAYERS = re.compile(
    r".*\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|proj_mlp|proj_out|ff\.net\.(0\.proj|2)|norm1?\.linear)|x_embedder"
)
RANK = 3


def make_lora(
    model: nn.Module, *, seed: int, prefix: str = "transformer", layers: re.Pattern[str] = LAYERS
) -> dict[str, Tensor]:
    """Tensors by diffusers' names, for all layers whose names match."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and layers.fullmatch(name):
            down = torch.randn(RANK, module.in_features, generator=generator) / math.sqrt(module.in_features)
            up = 0.5 * torch.randn(module.out_features, RANK, generator=generator) / math.sqrt(RANK)
            tensors |= {f"{prefix}.{name}.lora_A.weight": down, f"{prefix}.{name}.lora_B.weight": up}
    return tensors


def save_lora(tensors: dict[str, Tensor], file: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file


@torch.no_grad()
def add_lora(model: nn.Module, tensors: dict[str, Tensor], weight: float = 1.0, prefix: str = "transformer") -> None:
    """W + weight B A, in the place of W."""
    for name, down in tensors.items():
        if name.startswith(f"{prefix}.") and ".lora_A." in name:
            layer = model.get_submodule(name.removeprefix(f"{prefix}.").removesuffix(".lora_A.weight"))
            layer.weight += weight * tensors[name.replace(".lora_A.", ".lora_B.")] @ down


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape) / math.sqrt(shape[-1])


def put_on(
    pipe: FluxPipeline, model: Path, tensors: dict[str, Tensor], file: Path, weight: float = 1.0, **metadata: str
) -> None:
    """Compare with the model's files, then load, as a job does."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)
    lora = Lora(source=str(file), weight=weight)
    compare_loras([lora], read_folder(model, CARDS), CARDS, Options())
    load_loras(pipe, [lora], CARDS)


@torch.no_grad()
def changes(part: nn.Module) -> dict[str, Tensor]:
    """What adapters add to the weights of each layer that has one, and to its bias."""
    found = {}
    for name, layer in part.named_modules():
        if hasattr(layer, "base_layer"):
            inputs = torch.cat([torch.zeros(1, layer.in_features), torch.eye(layer.in_features)])
            added = layer(inputs) - layer.base_layer(inputs)
            found[name] = (added[1:] - added[0]).T
            if added[0].any():
                found[f"{name}.bias"] = added[0]
    return found


def require_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        torch.testing.assert_close(
            found[name], change, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def as_kohya(tensors: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Names of double blocks' text MLP and of single blocks' output as kohya's scripts have them; the rest is left out."""
    names = {
        r"transformer\.transformer_blocks\.(\d+)\.ff\.net\.0\.proj": r"lora_unet_double_blocks_\1_img_mlp_0",
        r"transformer\.transformer_blocks\.(\d+)\.ff\.net\.2": r"lora_unet_double_blocks_\1_img_mlp_2",
        r"transformer\.single_transformer_blocks\.(\d+)\.proj_out": r"lora_unet_single_blocks_\1_linear2",
    }
    renamed = {}
    for name, tensor in tensors.items():
        layer, part = name.split(".lora_")
        for theirs, kohya in names.items():
            if re.fullmatch(theirs, layer):
                new = re.sub(theirs, kohya, layer)
                renamed[f"{new}.lora_{'down' if part.startswith('A') else 'up'}.weight"] = tensor
                renamed[f"{new}.alpha"] = torch.tensor(alpha)
    return renamed
