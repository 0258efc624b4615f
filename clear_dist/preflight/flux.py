"""FLUX's transformer by its configuration alone: the name and shape of every tensor."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from clear_dist.preflight.headers import Shapes

TIME_CHANNELS = 256
MLP_RATIO = 4


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
    def of(cls, config: Mapping[str, Any]) -> Self:
        """From the contents of config.json."""
        return cls(**{name: config[name] for name in cls.__dataclass_fields__ if name in config})

    @property
    def channels(self) -> int:
        """Of a token inside the transformer."""
        return self.num_attention_heads * self.attention_head_dim

    def tensors(self) -> Shapes:
        """All of the transformer's."""
        return dict(self._tensors())

    def clear_tensors(self) -> Shapes:
        """Those that a CLEAR checkpoint replaces: the image side of attention. Single blocks have no to_out."""
        image_side = (".attn.to_q.", ".attn.to_k.", ".attn.to_v.", ".attn.to_out.0.")
        return {name: shape for name, shape in self._tensors() if any(part in name for part in image_side)}

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


def _linear(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)
