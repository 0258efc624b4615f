"""CLEAR checkpoints, which replace the image side of every attention layer (paper, Sec. 3.3)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from clear_dist.cards import clear
from clear_dist.engine.agreement import checksum
from clear_dist.engine.pooled_keys import Pooling
from clear_dist.engine.stock import attention_layers


@dataclass(frozen=True, kw_only=True)
class ReplacedWeights:
    """Parameters replaced by a CLEAR checkpoint's, and its down-sampled keys."""

    file: Path
    tensors: tuple[str, ...]
    layers: int
    pooling: Pooling | None

    @property
    def figures(self) -> dict[str, Any]:
        return {
            "file": str(self.file),
            "radius": clear.radius_of(self.file),
            "down_factor": 1 if self.pooling is None else self.pooling.factor,
            "tensors": len(self.tensors),
            "layers": self.layers,
        }

    def __str__(self) -> str:
        radius = self.figures["radius"] or "not in its name"
        pooled = "" if self.pooling is None else f", down factor {self.pooling.factor}"
        return (
            f"{self.file.name} (radius {radius}{pooled}), {len(self.tensors)} tensors in {self.layers} layers replaced"
        )

    def checksums(self, transformer: Any) -> list[tuple[int, int]]:
        replaced = [transformer.get_parameter(name) for name in self.tensors]
        return [checksum(tensor) for tensor in (*replaced, *(self.pooling.weights if self.pooling is not None else ()))]


def require_radius(path: str | Path) -> int:
    """Radius in tokens from a name such as `clear_local_16.safetensors`; raises ValueError where it has none."""
    radius = clear.radius_of(path)
    if radius is None:
        raise ValueError(
            f"a CLEAR checkpoint is named clear_local_<radius>.safetensors, got {Path(path).name}; pass window=<radius>"
        )
    return radius


def load_clear_weights(transformer: Any, path: str | Path, device: torch.device | str = "cpu") -> ReplacedWeights:
    """Replace the image side of attention by a checkpoint's; LoRA layers stay on top.

    Raises ValueError, before any change, for a file that is damaged or another model's, or a LoRA fused in the weights.
    """
    for name, module in transformer.named_modules():
        if clear.is_image_side(f"{name}.") and getattr(module, "merged", False):
            raise ValueError(f"CLEAR weights replace {name}, a fused LoRA included; call pipe.unfuse_lora() first")
    parameters = dict(image_attention_parameters(transformer))
    layers = [name for name in attention_layers(transformer) if clear.JOINT.fullmatch(f"{name}.")]
    clear.refuse_pickled(path)
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            # One tensor at a time: a checkpoint may take gigabytes.
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
            factor = clear.down_factor_of(shapes, path)
            own = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
            clear.require_same_tensors(clear.with_spatial_weights(own, factor), shapes, path)
            for name, parameter in parameters.items():
                # On a CPU a view of the file, which ranks share, as they share the model's; a copy is not shared.
                parameter.data = file.get_tensor(name).to(parameter.device).to(parameter.dtype)
            pooling = None
            if factor > 1:
                tensors = (file.get_tensor(f"{layer}.{clear.SPATIAL_WEIGHT}") for layer in layers)
                weights = (tensor.reshape(factor, factor).to(device, transformer.dtype) for tensor in tensors)
                pooling = Pooling(weights=tuple(weights))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"CLEAR weights must be a complete safetensors file, got {path}: {error}") from error
    return ReplacedWeights(file=Path(path), tensors=tuple(parameters), layers=len(layers), pooling=pooling)


def image_attention_parameters(transformer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that a checkpoint must hold, by their names in it."""
    for name, module in transformer.named_modules():
        if clear.is_image_side(f"{name}.") and name.endswith(clear.PROJECTIONS):
            linear = getattr(module, "base_layer", module)  # under a LoRA's wrapping
            yield from ((f"{name}.{part}", parameter) for part, parameter in linear.named_parameters(recurse=False))
