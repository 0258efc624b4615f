"""A tiny model of each family, and samples for it, of a grid of 4 x 6 tokens."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clear_dist.families.flux.sample import FluxSample
from clear_dist.families.flux2.sample import Flux2Sample
from clear_dist.families.sd3.sample import SD3Sample
from clear_dist.families.z_image.sample import ZImageSample
from tests.training import oracle

GRID = (4, 6)


@dataclass(frozen=True)
class Tiny:
    """What the oracle is to know of a family; `blind`, `compared`: numbers of calls of attention."""

    sample: Any
    forward: Any
    latents: tuple[int, ...]
    embeddings: tuple[tuple[int, ...], ...]
    text_first: bool
    compared: list[int]
    blind: tuple[int, ...] = ()

    def transformer(self) -> Any:
        made = self.sample.pipeline(torch.device("cpu"), torch.float32).transformer
        if self.sample.name == "Z-Image":  # positions for captions of two lengths
            longer = type(made).from_config({**made.config, "axes_lens": [128, 512, 512]})
            longer.load_state_dict(made.state_dict())
            made = longer.eval()
        return made.requires_grad_(False)

    def texts(self, count: int) -> list[Tensor]:
        made = [torch.randn(count, *shape) for shape in self.embeddings]
        return made if self.sample.name != "Z-Image" else [*made, torch.tensor([8, 40, 33, 5])[:count]]


TINY = {
    "flux": Tiny(FluxSample(), oracle.flux, (16, 8, 12), ((8, 24), (16,)), True, [1]),
    "flux2": Tiny(Flux2Sample(), oracle.flux2, (128, 4, 6), ((8, 24),), True, [1]),
    "sd3": Tiny(SD3Sample(), oracle.sd3, (16, 8, 12), ((8, 24), (16,)), False, [0, 2]),
    "z_image": Tiny(ZImageSample(), oracle.z_image, (16, 8, 12), ((40, 24),), False, [2], (1,)),
}
