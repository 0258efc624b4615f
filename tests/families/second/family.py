"""All that the engine is told of the second architecture."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from clear_dist.engine.cut import Cut, joined_rows
from clear_dist.engine.extrapolation import Extrapolation
from clear_dist.engine.family import Inputs, PipelineAdapter, Removable, Stripes
from clear_dist.engine.heads import Heads
from clear_dist.geometry import TextPlan
from tests.families.second.transformer import HEADS, LATENTS, PATCH, TEXT_WIDTH, WIDTH


@dataclass
class JointStripes:
    striped: Stripes
    layer: int

    def __call__(self, attn: Any, image: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        count = text.shape[1]
        sizes = {"tokens": count + image.shape[1], "heads": attn.heads, "head_dim": attn.head_dim}
        heads = Heads(self.striped, self.layer, image, **sizes)
        for mine, x in zip(heads.own, attn.of_image(image), strict=True):
            mine[:, count:] = x.unflatten(-1, (attn.heads, -1))
        heads.start_halos()
        for mine, x in zip(heads.own, attn.of_text(text), strict=True):
            mine[:, :count] = x.unflatten(-1, (attn.heads, -1))
        heads.start_text()
        output = heads.attend()
        return attn.out(output[:, count:]), attn.text_out(output[:, :count])


@dataclass
class ImageStripes:
    striped: Stripes
    layer: int

    def __call__(self, attn: Any, image: Tensor) -> Tensor:
        sizes = {"tokens": image.shape[1], "heads": attn.heads, "head_dim": attn.head_dim}
        heads = Heads(self.striped, self.layer, image, alone=True, **sizes)
        for mine, x in zip(heads.own, attn.of_image(image), strict=True):
            mine.copy_(x.unflatten(-1, (attn.heads, -1)))
        heads.start_halos()
        return attn.out(heads.attend())


@dataclass(frozen=True)
class Second:
    transformer: Any
    head_dim = WIDTH // HEADS
    per_picture = ()
    channels = WIDTH

    @property
    def embedder(self) -> nn.Module:
        return self.transformer.time

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.transformer.blocks)

    @property
    def products(self) -> list[str]:
        modules = self.transformer.blocks.named_modules(prefix="blocks")
        return [name for name, module in modules if isinstance(module, nn.Linear) and "modulation" not in name]

    @property
    def modulated(self) -> dict[str, nn.Module]:
        return {f"blocks.{index}.modulation": block.modulation for index, block in enumerate(self.transformer.blocks)}

    def embedder_inputs(self, inputs: tuple[Tensor, ...], timestep: Tensor) -> tuple[Tensor, ...]:
        return (timestep.expand(len(inputs[0]))[:, None] / 1000,)

    def processors(self, striped: Stripes) -> dict[str, JointStripes | ImageStripes]:
        kinds = {"attn2": ImageStripes, "attn": JointStripes}
        names = [(f"blocks.{block}.{name}", kind) for block in range(2) for name, kind in kinds.items()]
        return {name: kind(striped, layer) for layer, (name, kind) in enumerate(names)}

    def hooks(self, striped: Stripes) -> Sequence[Removable]:
        def positions(module: nn.Module, args: Any, _: Tensor) -> Tensor:
            cut = striped.running_cut
            return cut.own_tokens(module.forward(*cut.size), dim=0)

        return [self.transformer.positions.register_forward_hook(positions)]

    def named_inputs(self, args: tuple[Any, ...], kwargs: Inputs) -> Inputs:
        return dict(signature(self.transformer.forward).bind(*args, **kwargs).arguments)

    def empty_inputs(self, size: tuple[int, int], *, images: int, text_tokens: int) -> Inputs:
        weight = self.transformer.text.weight
        return {
            "latents": weight.new_empty(images, LATENTS, PATCH * size[0], PATCH * size[1]),
            "text": weight.new_empty(images, text_tokens, TEXT_WIDTH),
            "timestep": weight.new_empty(images),
            "mask": weight.new_empty(images, text_tokens, dtype=torch.bool),
        }

    def generation(self, inputs: Inputs) -> object:
        return inputs["text"]

    def latents(self, inputs: Inputs) -> Tensor:
        return inputs["latents"]

    def grid_of(self, inputs: Inputs) -> tuple[int, int]:
        height, width = inputs["latents"].shape[2:]
        return height // PATCH, width // PATCH

    def text_tokens(self, inputs: Inputs) -> int:
        return inputs["text"].shape[1]

    def text_mask(self, inputs: Inputs) -> Tensor:
        return inputs["mask"]

    def replicated(self, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
        return [inputs["latents"], inputs["timestep"], inputs["mask"]], [inputs["text"]]

    def cut(self, inputs: Inputs, cut: Cut, text: TextPlan) -> Inputs:
        mine = cut.own_patches(inputs["latents"], PATCH)
        return {**inputs, "latents": mine, "text": inputs["text"][:, text.own]}

    def joined(self, output: Tensor, cut: Cut) -> Tensor:
        return joined_rows(output, cut, PATCH)

    def extrapolated(self, extrapolation: Extrapolation) -> AbstractContextManager[None]:
        return nullcontext()

    def adapted(self, pipe: Any) -> PipelineAdapter:
        raise AssertionError("not drawn with `generate`")


def draw_weights(model: nn.Module, seed: int = 0) -> None:
    """Large enough that attention matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = 1.5 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.2
        parameter.data = scale * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1)
