"""What a plan needs to know of a model: the shapes of its tensors and the layers of its VAE. Numbers only."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

Shapes = Mapping[str, tuple[int, ...]]

BLOCK = re.compile(r"((?:single_)?transformer_blocks\.\d+)\.")
MODULATION = re.compile(r".*\.norm(1|1_context)?\.linear\.(weight|bias)|norm_out\.linear\.(weight|bias)")
PRODUCT = re.compile(r"(single_)?transformer_blocks\.\d+\.(attn\.(to|add)_.*|ff.*|proj.*)\.weight")


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
    def modulation(self) -> int:
        """Numbers that `--hoist-modulation` keeps in host memory."""
        return self._numbers(name for name in self.transformer if MODULATION.fullmatch(name))

    @cached_property
    def products(self) -> int:
        """Numbers of the weights that all tokens are multiplied with: what is quantised."""
        return self._numbers(self._product_names)

    @cached_property
    def product_rows(self) -> int:
        """Rows of these weights; each has a scale once it is quantised."""
        return sum(self.transformer[name][0] for name in self._product_names)

    @cached_property
    def numbers(self) -> int:
        """Of all weights of the transformer."""
        return self._numbers(self.transformer)

    @cached_property
    def in_blocks(self) -> int:
        """Numbers of the weights in blocks: what is sharded over ranks."""
        return self._numbers(name for name in self.transformer if BLOCK.match(name))

    @cached_property
    def largest_block(self) -> int:
        """Numbers of the weights of the largest block."""
        sizes: dict[str, int] = {}
        for name, shape in self.transformer.items():
            if found := BLOCK.match(name):
                sizes[found[1]] = sizes.get(found[1], 0) + prod(shape)
        return max(sizes.values())

    @property
    def modulation_outputs(self) -> int:
        """Numbers that AdaLN's layers put out, for a picture in a step."""
        names = (name for name in self.transformer if MODULATION.fullmatch(name) and name.endswith("bias"))
        return self._numbers(names)

    @property
    def _product_names(self) -> list[str]:
        return [name for name in self.transformer if PRODUCT.fullmatch(name)]

    def _numbers(self, names: Iterable[str]) -> int:
        return sum(prod(self.transformer[name]) for name in names)
