"""Stable Diffusion 3 and 3.5 without torch: hub models, and all tensors by the numbers of config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from clear_dist.cards.card import Card, Defaults, HubModel, LoraLayer, TextEncoders
from clear_dist.cards.clear import Shapes
from clear_dist.cards.headers import LARGEST_NUMBER, whole_number
from clear_dist.cards.tensors import AUTOENCODER_KL, T5_FILES, Tensors, clear_tensors, linear, lora_layers
from clear_dist.families.sd3.names import ORIGINALS, original_layers
from clear_dist.options import Refusal, shortened
from clear_dist.stages import Sampling, Upscaling

LARGE = "stabilityai/stable-diffusion-3.5-large"
PACKING = 2
"""Latents along the side of a token."""
SWAPPED = ("final_layer.adaLN_modulation.1",)
"""Original layers with shift, then scale."""
CLIP_TOKENS = 77
"""Text tokens of the CLIP encoders, before T5's."""
TIME_CHANNELS = 256
MLP_RATIO = 4


@dataclass(frozen=True, kw_only=True)
class SD3Shape:
    """Numbers of config.json that decide the transformer's tensors; the defaults are diffusers'."""

    in_channels: int = 16
    out_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 96
    patch_size: int = PACKING
    dual_attention_layers: tuple[int, ...] = ()
    """Blocks with a second attention, of the image alone."""
    norms_heads: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], where: Path | str) -> Self:
        """From the contents of the file `where`; raises a Refusal for numbers that make no such transformer."""
        names = [name for name, each in cls.__dataclass_fields__.items() if each.type is int or each.type == "int"]
        numbers = {name: whole_number(config, name, getattr(cls, name), where) for name in names}
        dual = config.get("dual_attention_layers") or ()
        if not isinstance(dual, list | tuple) or not set(map(repr, dual)) <= set(map(repr, range(LARGEST_NUMBER))):
            raise Refusal(f"dual_attention_layers must be a list of blocks, got {_shown(dual)} in {where}; nearest: []")
        norm = config.get("qk_norm")
        if norm not in (None, "rms_norm"):
            raise Refusal(f"qk_norm must be null or rms_norm, got {_shown(norm)} in {where}; nearest: rms_norm")
        shape = cls(**numbers, dual_attention_layers=tuple(dual), norms_heads=norm is not None)
        for name, expected in (("patch_size", PACKING), ("caption_projection_dim", shape.channels)):
            if numbers[name] != expected:
                raise Refusal(f"{name} must be {expected}, got {numbers[name]} in {where}; is it of another model?")
        return shape

    @property
    def channels(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def tensors(self) -> Shapes:
        return dict(self._tensors())

    def clear_tensors(self, down_factor: int = 1) -> Shapes:
        return clear_tensors(self.tensors(), down_factor)

    def lora_layers(self) -> dict[str, LoraLayer]:
        """Linear layers by diffusers' and the original names."""
        tensors, last = self.tensors(), f"joint_blocks.{self.num_layers - 1}.context_block.adaLN_modulation.1"
        layers = [name.removesuffix(".weight") for name, shape in tensors.items() if len(shape) == 2]
        return lora_layers(tensors, original_layers(layers), swapped=(*SWAPPED, last))

    def defaults(self, scheduler: Mapping[str, Any], pipeline: Mapping[str, Any]) -> Defaults:
        """By the model cards of 3.5-Large, 3.5-Medium (with dual attention) and 3-Medium (without norms of heads)."""
        if not self.norms_heads:
            return self.guided(steps=28, scale=7.0)
        return self.guided(steps=40, scale=4.5) if self.dual_attention_layers else self.guided(steps=28, scale=3.5)

    def guided(self, *, steps: int, scale: float) -> Defaults:
        """Classifier-free guidance with an empty negative prompt; a scale of 1: none."""
        return Defaults(
            takes_guidance=False,
            has_rotary_positions=False,
            interpolated_above=self.pos_embed_max_size,
            sampling=Sampling(steps=steps, guidance_scale=0.0, true_cfg_scale=scale),
            upscaling=Upscaling(guidance_scale=0.0, true_cfg_scale=scale),
            negative_prompt="",
            max_sequence_length=256,
        )

    def _tensors(self) -> Tensors:
        width = self.channels
        yield "pos_embed.pos_embed", (1, self.pos_embed_max_size**2, width)
        yield "pos_embed.proj.weight", (width, self.in_channels, PACKING, PACKING)
        yield "pos_embed.proj.bias", (width,)
        for name, channels in (("timestep", TIME_CHANNELS), ("text", self.pooled_projection_dim)):
            yield from linear(f"time_text_embed.{name}_embedder.linear_1", channels, width)
            yield from linear(f"time_text_embed.{name}_embedder.linear_2", width, width)
        yield from linear("context_embedder", self.joint_attention_dim, self.caption_projection_dim)
        for index in range(self.num_layers):
            yield from self._block(index)
        yield from linear("norm_out.linear", width, 2 * width)
        yield from linear("proj_out", width, PACKING**2 * self.out_channels)

    def _block(self, index: int) -> Tensors:
        width, block = self.channels, f"transformer_blocks.{index}"
        is_last, is_dual = index == self.num_layers - 1, index in self.dual_attention_layers
        yield from linear(f"{block}.norm1.linear", width, (9 if is_dual else 6) * width)
        yield from linear(f"{block}.norm1_context.linear", width, (2 if is_last else 6) * width)
        text_side = ("add_q_proj", "add_k_proj", "add_v_proj", *(() if is_last else ("to_add_out",)))
        image_side = ("to_q", "to_k", "to_v", "to_out.0")
        for name in (*image_side, *text_side):
            yield from linear(f"{block}.attn.{name}", width, width)
        for name in image_side if is_dual else ():
            yield from linear(f"{block}.attn2.{name}", width, width)
        norms = ("attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k")
        for name in (*norms, *(("attn2.norm_q", "attn2.norm_k") if is_dual else ())) if self.norms_heads else ():
            yield f"{block}.{name}.weight", (self.attention_head_dim,)
        for name in ("ff",) if is_last else ("ff", "ff_context"):
            yield from linear(f"{block}.{name}.net.0.proj", width, MLP_RATIO * width)
            yield from linear(f"{block}.{name}.net.2", MLP_RATIO * width, width)


def _shown(value: object) -> str:
    return shortened(repr(value))


_TEXT = TextEncoders(numbers=123_650_304 + 694_659_840 + 4_762_310_656, heads=64, channels=4096, hidden=10_240)
"""CLIP-L and CLIP-G with their projections, and T5-XXL."""
_LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
_3_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
_3_5_MEDIUM = _3_MEDIUM | {
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}


def _hub_model(name: str, short: str, config: Mapping[str, Any], **guidance: Any) -> HubModel:
    shape = SD3Shape.of(config, name)
    return HubModel(
        id=name,
        short=short,
        native_size=1024,
        shape=shape,
        defaults=shape.guided(**guidance) if guidance else shape.defaults({}, {}),
        configs={"transformer": config, "vae": AUTOENCODER_KL},
        text=_TEXT,
    )


CARD = Card(
    pipeline="StableDiffusion3Pipeline",
    scheduler="FlowMatchEulerDiscreteScheduler",
    parts={
        "transformer": "diffusers.SD3Transformer2DModel",
        "vae": "diffusers.AutoencoderKL",
        "text_encoder": "transformers.CLIPTextModelWithProjection",
        "text_encoder_2": "transformers.CLIPTextModelWithProjection",
        "text_encoder_3": "transformers.T5EncoderModel",
        "tokenizer": None,
        "tokenizer_2": None,
        "tokenizer_3": None,
        "scheduler": None,
    },
    shape_of=SD3Shape.of,
    packing=PACKING,
    channels_per_latent=1,
    vae_channels=(128, 256, 512, 512),
    latent_channels=16,
    native_size=1024,
    further_text_tokens=CLIP_TOKENS,
    guides_in_one_pass=True,
    token_limits={"tokenizer": CLIP_TOKENS, "tokenizer_2": CLIP_TOKENS},
    schedule={"shift": 3.0},
    originals=ORIGINALS,
    files={
        "text_encoder": ("clip_l",),
        "text_encoder_2": ("clip_g",),
        "text_encoder_3": T5_FILES,
        "vae": ("sd3_vae", "sd3.5_vae"),
    },
    hub_models=(
        _hub_model(LARGE, "sd3.5-large", _LARGE),
        _hub_model(f"{LARGE}-turbo", "sd3.5-large-turbo", _LARGE, steps=4, scale=1.0),
        _hub_model("stabilityai/stable-diffusion-3.5-medium", "sd3.5-medium", _3_5_MEDIUM),
        _hub_model("stabilityai/stable-diffusion-3-medium-diffusers", "sd3-medium", _3_MEDIUM),
    ),
)
