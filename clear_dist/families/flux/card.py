"""FLUX without torch: hub models, parts of folders, and all tensors by the numbers of config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Self

from clear_dist.cards.card import Card, Defaults, HubModel, LoraLayer, Published, TextEncoders
from clear_dist.cards.clear import Shapes
from clear_dist.cards.headers import whole_number, whole_numbers
from clear_dist.cards.tensors import (
    AUTOENCODER_KL,
    NORMS,
    T5_FILES,
    Layers,
    Tensors,
    clear_tensors,
    linear,
    lora_layers,
)
from clear_dist.options import Refusal, shortened
from clear_dist.stages import Sampling, Upscaling

FLUX_DEV = "black-forest-labs/FLUX.1-dev"
FLUX_SCHNELL = "black-forest-labs/FLUX.1-schnell"
CLEAR_REPOSITORY = "Huage001/CLEAR"
URAE = "Huage001/URAE:urae_{}.safetensors"
"""LoRA for 2K and 4K (arXiv 2503.16322); the latter, minor-component adapters made LoRA, have the former in them.

FLUX.1-dev and schnell share the file for 2K (`inference_2k.ipynb` and `inference_2k_schnell.ipynb` of
github.com/Huage001/URAE); for 4K each has its own (`inference_4k_lora_conversion.ipynb`, `..._schnell.ipynb`).
"""
PACKING = 2
"""Latents along the side of a token."""
SWAPPED = ("final_layer.adaLN_modulation.1",)
"""Original layers with shift, then scale."""
TIME_CHANNELS = 256
MLP_RATIO = 4
ROPE_AXES = (16, 56, 56)
"""Channels of a head that tell apart pictures, rows and columns."""
YARN = "yarn"
YARN_NATIVE_TOKENS = 128
"""Side of the square that UltraFlux was trained at, 4096 px: its VAE's configuration tells FLUX.1's."""

QKV = ("to_q", "to_k", "to_v")
SIDES = {
    "img": (QKV, "to_out.0", "ff", "norm1"),
    "txt": (("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context", "norm1_context"),
}
"""Diffusers' names in a double block: attention's inputs and output, MLP, modulation."""


@dataclass(frozen=True, kw_only=True)
class FluxShape:
    """Numbers of config.json that decide the transformer's tensors; the defaults are diffusers'."""

    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    has_yarn: bool = False
    """Whether its positions are UltraFlux's, of which diffusers knows nothing."""

    @classmethod
    def of(cls, config: Mapping[str, Any], where: Path | str) -> Self:
        """From the contents of the file `where`; raises a Refusal for wrong numbers, or axes that do not fill heads."""
        others = "guidance_embeds", "has_yarn", "out_channels"
        names = [name for name in cls.__dataclass_fields__ if name not in others]
        numbers = {name: whole_number(config, name, getattr(cls, name), where) for name in names}
        if config.get("out_channels") is not None:
            numbers["out_channels"] = whole_number(config, "out_channels", numbers["in_channels"], where)
        _check_axes(whole_numbers(config, "axes_dims_rope", ROPE_AXES, where), numbers["attention_head_dim"], where)
        return cls(**numbers, guidance_embeds=bool(config.get("guidance_embeds")), has_yarn=is_yarn(config))

    @property
    def channels(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def tensors(self) -> Shapes:
        return dict(self._tensors())

    def clear_tensors(self, down_factor: int = 1) -> Shapes:
        return clear_tensors(self.tensors(), down_factor)

    def lora_layers(self) -> dict[str, LoraLayer]:
        """Linear layers by diffusers', the original and XLabs' names."""
        others = chain(self._original_layers(), self._xlabs_layers())
        return lora_layers(self.tensors(), others, swapped=SWAPPED)

    def defaults(self, scheduler: Mapping[str, Any], pipeline: Mapping[str, Any]) -> Defaults:
        """UltraFlux's, FLUX.1-dev's, or schnell's 4 steps where neither guidance is taken nor the schedule shifts."""
        if self.has_yarn:
            return _ultraflux(takes_guidance=self.guidance_embeds)
        if self.guidance_embeds or scheduler.get("use_dynamic_shifting", False):
            return Defaults(takes_guidance=self.guidance_embeds)
        sampling, upscaling = Sampling(steps=4, guidance_scale=0.0), Upscaling(guidance_scale=0.0)
        return Defaults(takes_guidance=False, sampling=sampling, upscaling=upscaling, max_sequence_length=256)

    def _tensors(self) -> Tensors:
        width = self.channels
        yield from linear("x_embedder", self.in_channels, width)
        yield from linear("context_embedder", self.joint_attention_dim, width)
        embedders = {"timestep_embedder": TIME_CHANNELS, "text_embedder": self.pooled_projection_dim}
        if self.guidance_embeds:
            embedders["guidance_embedder"] = TIME_CHANNELS
        for name, channels in embedders.items():
            yield from linear(f"time_text_embed.{name}.linear_1", channels, width)
            yield from linear(f"time_text_embed.{name}.linear_2", width, width)
        for index in range(self.num_layers):
            yield from self._double_block(f"transformer_blocks.{index}")
        for index in range(self.num_single_layers):
            yield from self._single_block(f"single_transformer_blocks.{index}")
        yield from linear("norm_out.linear", width, 2 * width)
        yield from linear("proj_out", width, self.out_channels or self.in_channels)

    def _double_block(self, block: str) -> Tensors:
        width = self.channels
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            yield from linear(f"{block}.attn.{name}", width, width)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            yield f"{block}.attn.{name}.weight", (self.attention_head_dim,)
        for name in ("norm1", "norm1_context"):
            yield from linear(f"{block}.{name}.linear", width, 6 * width)
        for name in ("ff", "ff_context"):
            yield from linear(f"{block}.{name}.net.0.proj", width, MLP_RATIO * width)
            yield from linear(f"{block}.{name}.net.2", MLP_RATIO * width, width)

    def _single_block(self, block: str) -> Tensors:
        width = self.channels
        for name in ("to_q", "to_k", "to_v"):
            yield from linear(f"{block}.attn.{name}", width, width)
        for name in ("norm_q", "norm_k"):
            yield f"{block}.attn.{name}.weight", (self.attention_head_dim,)
        yield from linear(f"{block}.norm.linear", width, 3 * width)
        yield from linear(f"{block}.proj_mlp", width, MLP_RATIO * width)
        yield from linear(f"{block}.proj_out", (1 + MLP_RATIO) * width, width)

    def _original_layers(self) -> Layers:
        """Black Forest Labs' names, which kohya's scripts share; queries, keys and values are one layer."""
        for index in range(self.num_layers):
            block = f"transformer_blocks.{index}"
            for side, (qkv, proj, mlp, norm) in SIDES.items():
                original = f"double_blocks.{index}.{side}"
                yield f"{original}_attn.qkv", tuple(f"{block}.attn.{name}" for name in qkv)
                yield f"{original}_attn.proj", (f"{block}.attn.{proj}",)
                yield f"{original}_mlp.0", (f"{block}.{mlp}.net.0.proj",)
                yield f"{original}_mlp.2", (f"{block}.{mlp}.net.2",)
                yield f"{original}_mod.lin", (f"{block}.{norm}.linear",)
        for index in range(self.num_single_layers):
            block, original = f"single_transformer_blocks.{index}", f"single_blocks.{index}"
            yield f"{original}.linear1", (*(f"{block}.attn.{name}" for name in QKV), f"{block}.proj_mlp")
            yield f"{original}.linear2", (f"{block}.proj_out",)
            yield f"{original}.modulation.lin", (f"{block}.norm.linear",)
        embedders = {"time": "timestep", "vector": "text"} | ({"guidance": "guidance"} if self.guidance_embeds else {})
        for original, name in embedders.items():
            yield f"{original}_in.in_layer", (f"time_text_embed.{name}_embedder.linear_1",)
            yield f"{original}_in.out_layer", (f"time_text_embed.{name}_embedder.linear_2",)
        yield "img_in", ("x_embedder",)
        yield "txt_in", ("context_embedder",)
        yield "final_layer.linear", ("proj_out",)
        yield "final_layer.adaLN_modulation.1", ("norm_out.linear",)

    def _xlabs_layers(self) -> Layers:
        """XLabs' names, by attention processors; 1 is the image side, 2 the text side."""
        for index in range(self.num_layers):
            block, processor = f"transformer_blocks.{index}.attn", f"double_blocks.{index}.processor"
            for side, (qkv, proj, _, _) in enumerate(SIDES.values(), 1):
                yield f"{processor}.qkv_lora{side}", tuple(f"{block}.{name}" for name in qkv)
                yield f"{processor}.proj_lora{side}", (f"{block}.{proj}",)
        for index in range(self.num_single_layers):
            block, processor = f"single_transformer_blocks.{index}", f"single_blocks.{index}.processor"
            yield f"{processor}.qkv_lora", tuple(f"{block}.attn.{name}" for name in QKV)
            yield f"{processor}.proj_lora", (f"{block}.proj_out",)


def is_yarn(config: Mapping[str, Any]) -> bool:
    """Whether a transformer's configuration asks for UltraFlux's positions."""
    return config.get("method") == YARN


def _ultraflux(*, takes_guidance: bool) -> Defaults:
    """As inf_ultraflux.py of github.com/W2GenAI-Lab/UltraFlux draws; what leads upper stages has no other guidance."""
    scale = 4.0
    return Defaults(
        takes_guidance=takes_guidance,
        sampling=Sampling(steps=50, guidance_scale=scale),
        upscaling=Upscaling(guidance_scale=scale, ntk_factor=1.0),
        has_yarn=True,
        native_tokens=YARN_NATIVE_TOKENS,
        static_shift=True,
    )


def _check_axes(axes: tuple[int, ...], head_dim: int, where: Path | str) -> None:
    if len(axes) != len(ROPE_AXES) or sum(axes) != head_dim or any(axis % 2 for axis in axes):
        raise Refusal(
            f"axes_dims_rope must be three even numbers that sum up to attention_head_dim, {head_dim}, "
            f"got {shortened(str(list(axes)))} in {where}; are the files those of one model?"
        )


_TEXT = TextEncoders(numbers=123_060_480 + 4_762_310_656, heads=64, channels=4096, hidden=10_240)
"""CLIP and T5-XXL."""
_DEV, _SCHNELL = FluxShape(guidance_embeds=True), FluxShape()


def _hub_model(name: str, short: str, shape: FluxShape, scheduler: Mapping[str, Any]) -> HubModel:
    urae_4k = f"4k_adapter_lora_conversion_{short.removeprefix('flux-')}"
    return HubModel(
        id=name,
        short=short,
        native_size=1024,
        shape=shape,
        defaults=shape.defaults(scheduler, {}),
        configs={"transformer": {"guidance_embeds": shape.guidance_embeds}, "vae": AUTOENCODER_KL},
        text=_TEXT,
        loras={"urae-2k": URAE.format("2k_adapter"), "urae-4k": URAE.format(urae_4k)},
    )


CARD = Card(
    pipeline="FluxPipeline",
    scheduler="FlowMatchEulerDiscreteScheduler",
    parts={
        "transformer": "diffusers.FluxTransformer2DModel",
        "vae": "diffusers.AutoencoderKL",
        "text_encoder": "transformers.CLIPTextModel",
        "text_encoder_2": "transformers.T5EncoderModel",
        "tokenizer": None,
        "tokenizer_2": None,
        "scheduler": None,
    },
    shape_of=FluxShape.of,
    packing=PACKING,
    channels_per_latent=4,
    vae_channels=(128, 256, 512, 512),
    latent_channels=16,
    vae_strides=(1, 2),
    native_size=1024,
    token_limits={"tokenizer": 77},
    schedule={"shift": 3.0, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096},
    originals=NORMS,
    files={"text_encoder": ("clip_l",), "text_encoder_2": T5_FILES, "vae": ("ae",)},
    hub_models=(
        _hub_model(FLUX_DEV, "flux-dev", _DEV, {"use_dynamic_shifting": True}),
        _hub_model(FLUX_SCHNELL, "flux-schnell", _SCHNELL, {}),
    ),
    clear=Published(
        repository=CLEAR_REPOSITORY,
        files=tuple(f"clear_local_{variant}.safetensors" for variant in ("8", "16", "32", "8_down_4", "16_down_4")),
        radius=16,
    ),
)
