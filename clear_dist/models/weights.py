"""CLEAR checkpoints: the image side of every attention layer, laid over a base model (paper, Sec. 3.3)."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from clear_dist import clear_checkpoint
from clear_dist.clear_checkpoint import PROJECTIONS


def radius_of(path: str | Path) -> int:
    """The radius in tokens that a checkpoint was distilled for, from its name: `clear_local_16.safetensors`.

    Raises:
        ValueError: the name tells none, or it names down-sampled keys.
    """
    clear_checkpoint.refuse_down_sampled(path)
    radius = clear_checkpoint.radius_of(path)
    if radius is None:
        raise ValueError(
            f"a CLEAR checkpoint is named clear_local_<radius>.safetensors, got {Path(path).name}; pass window=<radius>"
        )
    return radius


def load_clear_weights(transformer: Any, path: str | Path) -> list[str]:
    """Replaces the image side of attention by a checkpoint's and returns the names of what was replaced.

    Text projections, norms and everything else stay the base model's. LoRA layers stay on top of what is replaced.

    Raises:
        ValueError: the file is none, or a tensor is missing, unexpected or of another shape; it is named. Or a LoRA
            is fused in what would be replaced.
    """
    parameters = dict(image_attention_parameters(transformer))
    require_unfused_lora(transformer)
    tensors = read_tensors(path)
    clear_checkpoint.refuse_down_sampled(path, tensors)
    clear_checkpoint.require_same_tensors(_shapes(parameters), _shapes(tensors), path)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return list(parameters)


def require_unfused_lora(transformer: Any) -> None:
    """Raises ValueError where weights hold a LoRA, which would be lost with them."""
    for name, module in transformer.named_modules():
        if clear_checkpoint.is_image_side(f"{name}.") and getattr(module, "merged", False):
            raise ValueError(f"CLEAR weights replace {name}, a fused LoRA included; call pipe.unfuse_lora() first")


def image_attention_parameters(transformer: Any) -> Iterable[tuple[str, nn.Parameter]]:
    """Name in a CLEAR checkpoint and parameter, for every tensor that a checkpoint must hold."""
    for blocks in ("transformer_blocks", "single_transformer_blocks"):
        for index, block in enumerate(getattr(transformer, blocks)):
            for projection in PROJECTIONS:
                linear = _submodule(block.attn, projection)
                if linear is not None:
                    prefix = f"{blocks}.{index}.attn.{projection}"
                    yield from ((f"{prefix}.{name}", getattr(linear, name)) for name in ("weight", "bias"))


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        ValueError: there is no such file, or it is truncated or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"CLEAR weights must be a complete safetensors file, got {path}: {error}") from error


def _shapes(tensors: Mapping[str, Tensor]) -> clear_checkpoint.Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _submodule(attn: nn.Module, name: str) -> nn.Module | None:
    """The linear layer itself, under a LoRA's wrapping too; None where single blocks have no `to_out`."""
    try:
        module = attn.get_submodule(name)
    except AttributeError:
        return None
    return getattr(module, "base_layer", module)
