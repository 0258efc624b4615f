"""Random LoRA for a tiny FLUX, and what it comes to when it is added to the weights by hand."""

import math
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

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
