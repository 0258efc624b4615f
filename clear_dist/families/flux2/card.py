"""FLUX.2 without torch: klein and dev, parts of folders, and all tensors by the numbers of config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from clear_dist.cards.card import Card, Defaults, HubModel, LoraLayer, TextEncoders
from clear_dist.cards.clear import Shapes
from clear_dist.cards.headers import positive_number, whole_number, whole_numbers
from clear_dist.cards.tensors import NORMS, Layers, Tensors, clear_tensors, lora_layers
from clear_dist.options import Refusal, shortened
from clear_dist.stages import Sampling, Upscaling

PACKING = 2
"""Latents along the side of a token."""
SWAPPED = ("final_layer.adaLN_modulation.1",)
"""Original layers with shift, then scale."""
ROPE_AXES = (32, 32, 32, 32)
"""Channels of a head that tell apart pictures, rows, columns and words."""
QKV = ("to_q", "to_k", "to_v")
SIDES = {
    "img": (QKV, "to_out.0", "ff"),
    "txt": (("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context"),
}
"""Diffusers' names in a double block: attention's inputs and output, MLP."""
MODULATION = {"double_stream_modulation_img": 6, "double_stream_modulation_txt": 6, "single_stream_modulation": 3}
"""Shifts, scales and gates that all blocks of a kind share."""


@dataclass(frozen=True, kw_only=True)
class Flux2Shape:
    """Numbers of config.json that decide the transformer's tensors; the defaults are diffusers'."""

    in_channels: int = 128
    out_channels: int | None = None
    num_layers: int = 8
    num_single_layers: int = 48
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    joint_attention_dim: int = 15_360
    timestep_guidance_channels: int = 256
    patch_size: int = 1
    mlp_ratio: float = 3.0
    guidance_embeds: bool = True

    @classmethod
    def of(cls, config: Mapping[str, Any], where: Path | str) -> Self:
        """From the contents of the file `where`; raises a Refusal for wrong numbers, or axes that do not fill heads."""
        others = ("guidance_embeds", "out_channels", "mlp_ratio")
        names = [name for name in cls.__dataclass_fields__ if name not in others]
        numbers = {name: whole_number(config, name, getattr(cls, name), where) for name in names}
        if config.get("out_channels") is not None:
            numbers["out_channels"] = whole_number(config, "out_channels", numbers["in_channels"], where)
        _check_axes(whole_numbers(config, "axes_dims_rope", ROPE_AXES, where), numbers["attention_head_dim"], where)
        ratio = positive_number(config, "mlp_ratio", cls.mlp_ratio, where)
        return cls(**numbers, mlp_ratio=ratio, guidance_embeds=bool(config.get("guidance_embeds", True)))

    @property
    def channels(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def hidden(self) -> int:
        """Channels of an MLP after its gate."""
        return int(self.channels * self.mlp_ratio)

    def tensors(self) -> Shapes:
        return dict(self._tensors())

    def clear_tensors(self, down_factor: int = 1) -> Shapes:
        return clear_tensors(self.tensors(), down_factor)

    def lora_layers(self) -> dict[str, LoraLayer]:
        """Linear layers by diffusers' and the original names."""
        return lora_layers(self.tensors(), self._original_layers(), swapped=SWAPPED)

    def defaults(self, scheduler: Mapping[str, Any], pipeline: Mapping[str, Any]) -> Defaults:
        """Dev's where guidance is embedded, else klein's: 4 steps if distilled, else 50 guided by a negative prompt."""
        if self.guidance_embeds:
            return Defaults(
                takes_negative_prompts=False,
                sampling=Sampling(steps=50, guidance_scale=4.0),
                upscaling=Upscaling(guidance_scale=4.0),
            )
        if pipeline.get("is_distilled"):
            return Defaults(
                takes_guidance=False,
                takes_negative_prompts=False,
                sampling=Sampling(steps=4, guidance_scale=0.0),
                upscaling=Upscaling(guidance_scale=0.0),
            )
        return Defaults(
            takes_guidance=False,
            sampling=Sampling(steps=50, guidance_scale=0.0, true_cfg_scale=4.0),
            upscaling=Upscaling(guidance_scale=0.0, true_cfg_scale=4.0),
            negative_prompt="",
        )

    def _tensors(self) -> Tensors:
        width = self.channels
        for embedder in ("timestep", *(("guidance",) if self.guidance_embeds else ())):
            name = f"time_guidance_embed.{embedder}_embedder"
            yield f"{name}.linear_1.weight", (width, self.timestep_guidance_channels)
            yield f"{name}.linear_2.weight", (width, width)
        for name, count in MODULATION.items():
            yield f"{name}.linear.weight", (count * width, width)
        yield "x_embedder.weight", (width, self.in_channels)
        yield "context_embedder.weight", (width, self.joint_attention_dim)
        for index in range(self.num_layers):
            yield from self._double_block(f"transformer_blocks.{index}")
        for index in range(self.num_single_layers):
            yield from self._single_block(f"single_transformer_blocks.{index}.attn")
        yield "norm_out.linear.weight", (2 * width, width)
        yield "proj_out.weight", (self.patch_size**2 * (self.out_channels or self.in_channels), width)

    def _double_block(self, block: str) -> Tensors:
        width = self.channels
        for inputs, output, mlp in SIDES.values():
            for name in (*inputs, output):
                yield f"{block}.attn.{name}.weight", (width, width)
            yield f"{block}.{mlp}.linear_in.weight", (2 * self.hidden, width)
            yield f"{block}.{mlp}.linear_out.weight", (width, self.hidden)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            yield f"{block}.attn.{name}.weight", (self.attention_head_dim,)

    def _single_block(self, attention: str) -> Tensors:
        width = self.channels
        yield f"{attention}.to_qkv_mlp_proj.weight", (3 * width + 2 * self.hidden, width)
        yield f"{attention}.to_out.weight", (width, width + self.hidden)
        for name in ("norm_q", "norm_k"):
            yield f"{attention}.{name}.weight", (self.attention_head_dim,)

    def _original_layers(self) -> Layers:
        """Black Forest Labs' names, which kohya's scripts share; queries, keys and values are one layer."""
        for index in range(self.num_layers):
            block = f"transformer_blocks.{index}"
            for side, (qkv, proj, mlp) in SIDES.items():
                original = f"double_blocks.{index}.{side}"
                yield f"{original}_attn.qkv", tuple(f"{block}.attn.{name}" for name in qkv)
                yield f"{original}_attn.proj", (f"{block}.attn.{proj}",)
                yield f"{original}_mlp.0", (f"{block}.{mlp}.linear_in",)
                yield f"{original}_mlp.2", (f"{block}.{mlp}.linear_out",)
        for index in range(self.num_single_layers):
            block, original = f"single_transformer_blocks.{index}.attn", f"single_blocks.{index}"
            yield f"{original}.linear1", (f"{block}.to_qkv_mlp_proj",)
            yield f"{original}.linear2", (f"{block}.to_out",)
        embedders = {"time": "timestep"} | ({"guidance": "guidance"} if self.guidance_embeds else {})
        for original, name in embedders.items():
            yield f"{original}_in.in_layer", (f"time_guidance_embed.{name}_embedder.linear_1",)
            yield f"{original}_in.out_layer", (f"time_guidance_embed.{name}_embedder.linear_2",)
        for name in MODULATION:
            yield f"{name}.lin", (f"{name}.linear",)
        yield "img_in", ("x_embedder",)
        yield "txt_in", ("context_embedder",)
        yield "final_layer.linear", ("proj_out",)
        yield "final_layer.adaLN_modulation.1", ("norm_out.linear",)


def _check_axes(axes: tuple[int, ...], head_dim: int, where: Path | str) -> None:
    if len(axes) != len(ROPE_AXES) or sum(axes) != head_dim or any(axis % 2 for axis in axes):
        raise Refusal(
            f"axes_dims_rope must be four even numbers that sum up to attention_head_dim, {head_dim}, "
            f"got {shortened(str(list(axes)))} in {where}; are the files those of one model?"
        )


_SHARED: Mapping[str, Any] = {
    "scheduler": "FlowMatchEulerDiscreteScheduler",
    "shape_of": Flux2Shape.of,
    "packing": PACKING,
    "channels_per_latent": PACKING**2,
    "vae_channels": (128, 256, 512, 512),
    "latent_channels": 32,
    "native_size": 1024,
    "starts_from_pictures": False,
    "reference_area": 1024**2,
    "token_limits": {},
    "schedule": {"shift": 3.0},
    "originals": NORMS,
}
_SMALL = Flux2Shape(
    num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
)
_LARGE = Flux2Shape(
    num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12_288, guidance_embeds=False
)
_QWEN3_4B = TextEncoders(numbers=4_022_468_096, heads=32, channels=2560, hidden=9728)
_QWEN3_8B = TextEncoders(numbers=8_190_735_360, heads=32, channels=4096, hidden=12_288)
_MISTRAL3 = TextEncoders(numbers=24_011_361_280, heads=32, channels=5120, hidden=32_768)


def _parts(text_encoder: str) -> dict[str, str | None]:
    return {
        "transformer": "diffusers.Flux2Transformer2DModel",
        "vae": "diffusers.AutoencoderKLFlux2",
        "text_encoder": text_encoder,
        "tokenizer": None,
        "scheduler": None,
    }


def _hub_model(name: str, shape: Flux2Shape, text: TextEncoders, *, is_distilled: bool = False) -> HubModel:
    numbers = {name: getattr(shape, name) for name in shape.__dataclass_fields__}
    return HubModel(
        id=f"black-forest-labs/FLUX.2-{name}",
        short=f"flux2-{name.lower()}",
        native_size=1024,
        shape=shape,
        defaults=shape.defaults({}, {"is_distilled": is_distilled}),
        configs={"transformer": numbers, "vae": {}},
        text=text,
    )


KLEIN = Card(
    pipeline="Flux2KleinPipeline",
    parts=_parts("transformers.Qwen3ForCausalLM"),
    files={"text_encoder": ("qwen3_4b", "qwen_3_4b", "qwen3_8b", "qwen_3_8b")},
    hub_models=(
        _hub_model("klein-4B", _SMALL, _QWEN3_4B, is_distilled=True),
        _hub_model("klein-9B", _LARGE, _QWEN3_8B, is_distilled=True),
        _hub_model("klein-base-4B", _SMALL, _QWEN3_4B),
        _hub_model("klein-base-9B", _LARGE, _QWEN3_8B),
    ),
    **_SHARED,
)
DEV = Card(
    pipeline="Flux2Pipeline",
    parts=_parts("transformers.Mistral3ForConditionalGeneration"),
    files={"text_encoder": ("mistral_3_small_flux2_bf16",)},
    needs=("torchvision",),
    hub_models=(_hub_model("dev", Flux2Shape(), _MISTRAL3),),
    **_SHARED,
)
