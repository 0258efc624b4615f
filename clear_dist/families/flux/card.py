"""FLUX's transformer by its configuration alone: the name and shape of every tensor."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from clear_dist.cards.clear import Shapes, is_image_side, with_spatial_weights
from clear_dist.cards.headers import whole_number, whole_numbers
from clear_dist.options import Refusal, shortened

FLUX_DEV = "black-forest-labs/FLUX.1-dev"
FLUX_SCHNELL = "black-forest-labs/FLUX.1-schnell"
CLEAR_REPOSITORY = "Huage001/CLEAR"
PACKING = 2
"""Latents along the side of a token."""
TIME_CHANNELS = 256
MLP_RATIO = 4
ROPE_AXES = (16, 56, 56)
"""Channels of a head that tell apart pictures, rows and columns."""


@dataclass(frozen=True, kw_only=True)
class FluxShape:
    """The numbers of a transformer's config.json that decide its tensors; the defaults are diffusers'."""

    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], where: Path | str) -> Self:
        """From the contents of config.json.

        Args:
            where: the file, for messages.

        Raises:
            Refusal: a number is none, or the axes of the positions do not fill the heads.
        """
        names = [name for name in cls.__dataclass_fields__ if name not in ("guidance_embeds", "out_channels")]
        numbers = {name: whole_number(config, name, getattr(cls, name), where) for name in names}
        if config.get("out_channels") is not None:
            numbers["out_channels"] = whole_number(config, "out_channels", numbers["in_channels"], where)
        _check_axes(whole_numbers(config, "axes_dims_rope", ROPE_AXES, where), numbers["attention_head_dim"], where)
        return cls(**numbers, guidance_embeds=bool(config.get("guidance_embeds")))

    @property
    def channels(self) -> int:
        """Of a token inside the transformer."""
        return self.num_attention_heads * self.attention_head_dim

    def tensors(self) -> Shapes:
        """All of the transformer's."""
        return dict(self._tensors())

    def clear_tensors(self, down_factor: int = 1) -> Shapes:
        """Those of a CLEAR checkpoint, with down-sampled keys where the factor is not 1."""
        replaced = {name: shape for name, shape in self._tensors() if is_image_side(name)}
        return with_spatial_weights(replaced, down_factor)

    def _tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        width = self.channels
        yield from _linear("x_embedder", self.in_channels, width)
        yield from _linear("context_embedder", self.joint_attention_dim, width)
        embedders = {"timestep_embedder": TIME_CHANNELS, "text_embedder": self.pooled_projection_dim}
        if self.guidance_embeds:
            embedders["guidance_embedder"] = TIME_CHANNELS
        for name, channels in embedders.items():
            yield from _linear(f"time_text_embed.{name}.linear_1", channels, width)
            yield from _linear(f"time_text_embed.{name}.linear_2", width, width)
        for index in range(self.num_layers):
            yield from self._double_block(f"transformer_blocks.{index}")
        for index in range(self.num_single_layers):
            yield from self._single_block(f"single_transformer_blocks.{index}")
        yield from _linear("norm_out.linear", width, 2 * width)
        yield from _linear("proj_out", width, self.out_channels or self.in_channels)

    def _double_block(self, block: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        width = self.channels
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            yield from _linear(f"{block}.attn.{name}", width, width)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            yield f"{block}.attn.{name}.weight", (self.attention_head_dim,)
        for name in ("norm1", "norm1_context"):
            yield from _linear(f"{block}.{name}.linear", width, 6 * width)
        for name in ("ff", "ff_context"):
            yield from _linear(f"{block}.{name}.net.0.proj", width, MLP_RATIO * width)
            yield from _linear(f"{block}.{name}.net.2", MLP_RATIO * width, width)

    def _single_block(self, block: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        width = self.channels
        for name in ("to_q", "to_k", "to_v"):
            yield from _linear(f"{block}.attn.{name}", width, width)
        for name in ("norm_q", "norm_k"):
            yield f"{block}.attn.{name}.weight", (self.attention_head_dim,)
        yield from _linear(f"{block}.norm.linear", width, 3 * width)
        yield from _linear(f"{block}.proj_mlp", width, MLP_RATIO * width)
        yield from _linear(f"{block}.proj_out", (1 + MLP_RATIO) * width, width)


def _check_axes(axes: tuple[int, ...], head_dim: int, where: Path | str) -> None:
    if len(axes) != len(ROPE_AXES) or sum(axes) != head_dim or any(axis % 2 for axis in axes):
        raise Refusal(
            f"axes_dims_rope must be three even numbers that sum up to attention_head_dim, {head_dim}, "
            f"got {shortened(str(list(axes)))} in {where}; are the files those of one model?"
        )


def _linear(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)
