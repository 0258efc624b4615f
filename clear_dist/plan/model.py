"""What a plan needs to know of a model: the shapes of its tensors and the layers of its VAE. Numbers only."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

BLOCK = re.compile(r"((?:single_)?transformer_blocks\.\d+)\.")
MODULATION = re.compile(r".*\.norm(1|1_context)?\.linear\.(weight|bias)|norm_out\.linear\.(weight|bias)")
PRODUCT = re.compile(r"(single_)?transformer_blocks\.\d+\.(attn\.(to|add)_.*|ff.*|proj.*)\.weight")


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor of the transformer."""

    shape: Shape
    block: str | None
    """That it is in."""
    is_modulation: bool
    """What `--hoist-modulation` keeps in host memory."""
    is_product: bool
    """What all tokens are multiplied with, and what is quantised."""

    @property
    def numbers(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class VaeSizes:
    """diffusers' AutoencoderKL; the defaults are FLUX.1's."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    """From full size down."""
    layers_per_block: int = 2
    latent_channels: int = 16
    attention: bool = True
    """In the middle, over all positions."""
    numbers: int = 83_819_683
    """Of all weights, in both halves."""


@dataclass(frozen=True, kw_only=True)
class TextSizes:
    """CLIP and T5 together; the defaults are FLUX.1's, with T5-XXL."""

    numbers: int = 123_060_480 + 4_762_310_656
    """Of all weights."""
    heads: int = 64
    """T5's, as what follows."""
    channels: int = 4096
    hidden: int = 10_240
    """Of its feed-forward layers."""


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """A FLUX pipeline."""

    name: str
    double_blocks: int
    single_blocks: int
    heads: int
    head_dim: int
    text_channels: int
    transformer: Shapes
    vae: VaeSizes
    text: TextSizes
    token: int = 16
    """Pixels along the side of a token."""
    latent_channels: int = 64
    """Of a token."""

    @property
    def channels(self) -> int:
        """Of a token inside the transformer."""
        return self.heads * self.head_dim

    @property
    def layers(self) -> int:
        return self.double_blocks + self.single_blocks

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """Of the transformer, all of them."""
        return tuple(
            Weight(
                shape=shape,
                block=found[1] if (found := BLOCK.match(name)) else None,
                is_modulation=bool(MODULATION.fullmatch(name)),
                is_product=bool(PRODUCT.fullmatch(name)),
            )
            for name, shape in self.transformer.items()
        )

    @cached_property
    def numbers(self) -> int:
        """Of all weights of the transformer."""
        return sum(weight.numbers for weight in self.weights)

    @cached_property
    def modulation(self) -> int:
        """Numbers that `--hoist-modulation` keeps in host memory."""
        return sum(weight.numbers for weight in self.weights if weight.is_modulation)

    @cached_property
    def products(self) -> int:
        """Numbers of the weights that all tokens are multiplied with."""
        return sum(weight.numbers for weight in self.weights if weight.is_product)

    @cached_property
    def modulation_outputs(self) -> int:
        """Numbers that AdaLN's layers put out, for a picture in a step."""
        return sum(weight.numbers for weight in self.weights if weight.is_modulation and len(weight.shape) == 1)
