"""LPIPS' networks from a file, in torchmetrics' own formula and with its weights of layers, without torchvision."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import lpips

HEAD = "lin{}.model.1.weight"
"""Name of a layer's weights in LPIPS' files, the one in torchmetrics included."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A torchvision network's `features`: convolutions, each with a ReLU after it, and pools, by their numbers."""

    convolutions: tuple[int, ...]
    pools: tuple[int, ...]
    pool: tuple[int, int]
    """Size and stride."""
    ends: tuple[int, ...]
    """Where each slice ends whose output is compared."""
    first_stride: int = 1


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "alex": Architecture(
            convolutions=(0, 3, 6, 8, 10), pools=(2, 5), pool=(3, 2), ends=(2, 5, 8, 10, 12), first_stride=4
        ),
        "vgg": Architecture(
            convolutions=(0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
            pools=(4, 9, 16, 23),
            pool=(2, 2),
            ends=(4, 9, 16, 23, 30),
        ),
    }
)


class Slices(nn.Module):
    """Outputs of all slices, for [B, 3, H, W]."""

    def __init__(self, slices: list[nn.Sequential]) -> None:
        super().__init__()
        self.slices = nn.ModuleList(slices)

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for each in self.slices:
            x = each(x)
            found.append(x)
        return found


class Perceptual(lpips._LPIPS):
    """`forward` is torchmetrics'; its constructor would ask for torchvision."""

    def __init__(self, slices: list[nn.Sequential], heads: list[Tensor]) -> None:
        nn.Module.__init__(self)
        self.spatial, self.resize = False, None
        self.scaling_layer = lpips.ScalingLayer()
        self.L = len(slices)
        self.add_module("net", Slices(slices))
        self.add_module("lins", nn.ModuleList(lpips.NetLinLayer(head.shape[1]) for head in heads))
        for layer, head in zip(self.lins, heads, strict=True):
            layer.load_state_dict({"model.0.weight": head})
        self.eval().requires_grad_(False)


def perceptual(weights: Mapping[str, Tensor]) -> Perceptual:
    """The network whose `features` a file has; with LPIPS' own heads in it those, else torchmetrics'.

    Raises ValueError where the file has another network's.
    """
    numbers = tuple(int(name.split(".")[1]) for name in weights if name.startswith("features.") and "weight" in name)
    kind = next((name for name, each in ARCHITECTURES.items() if set(numbers) == set(each.convolutions)), None)
    if kind is None:
        raise ValueError(f"features of {' or '.join(ARCHITECTURES)} are numbered otherwise than {sorted(numbers)[:6]}")
    architecture = ARCHITECTURES[kind]
    own = HEAD.format(0) in weights
    heads = weights if own else torch.load(_heads_file(kind), map_location="cpu", weights_only=True)
    first = zip((0, *architecture.ends), architecture.ends, strict=False)
    slices = [nn.Sequential(*(_layer(architecture, number, weights) for number in range(*span))) for span in first]
    return Perceptual(slices, [heads[HEAD.format(number)].float() for number in range(len(slices))])


def _layer(architecture: Architecture, number: int, weights: Mapping[str, Tensor]) -> nn.Module:
    if number in architecture.pools:
        return nn.MaxPool2d(*architecture.pool)
    if number not in architecture.convolutions:
        return nn.ReLU()
    weight, bias = (weights[f"features.{number}.{name}"].float() for name in ("weight", "bias"))
    size = weight.shape[-1]
    stride = architecture.first_stride if number == 0 else 1
    layer = nn.Conv2d(weight.shape[1], len(weight), size, stride, 2 if stride > 1 else size // 2)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def _heads_file(kind: str) -> Path:
    return Path(lpips.__file__).parent / "lpips_models" / f"{kind}.pth"
