"""Tables that cards make from a transformer's tensors: of CLEAR's checkpoints, and of layers that a LoRA may adapt."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from clear_dist.cards.card import LoraLayer
from clear_dist.cards.clear import Shapes, is_image_side, with_spatial_weights

Tensors = Iterator[tuple[str, tuple[int, ...]]]
Layers = Iterator[tuple[str, tuple[str, ...]]]
"""Name of a layer, and diffusers' names of those that it consists of."""

AUTOENCODER_KL: Mapping[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
"""Configuration of the VAE with 16 channels of several families, as far as it differs from diffusers' defaults."""

T5_FILES = ("t5xxl", "t5xxl_fp16", "t5xxl_bf16", "t5xxl_fp8_e4m3fn")
"""Names of T5-XXL's single files, without their ending."""
NORMS = {
    rf"{old}\.{kind}_norm\.scale": rf"{new}_{name}.weight"
    for old, new in {
        r"double_blocks\.(\d+)\.img_attn\.norm": r"transformer_blocks.\1.attn.norm",
        r"double_blocks\.(\d+)\.txt_attn\.norm": r"transformer_blocks.\1.attn.norm_added",
        r"single_blocks\.(\d+)\.norm": r"single_transformer_blocks.\1.attn.norm",
    }.items()
    for kind, name in (("query", "q"), ("key", "k"))
}
"""Patterns of Black Forest Labs' names of norms, with diffusers' names."""


def linear(name: str, inputs: int, outputs: int) -> Tensors:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def clear_tensors(tensors: Shapes, down_factor: int) -> Shapes:
    """Tensors of a CLEAR checkpoint: attention's image side; with a factor above 1 the spatial weights too."""
    return with_spatial_weights({name: tensors[name] for name in tensors if is_image_side(name)}, down_factor)


def lora_layers(tensors: Shapes, others: Layers, *, swapped: Collection[str] = ()) -> dict[str, LoraLayer]:
    """Linear layers by diffusers' names and `others`; the halves of those in `swapped` are in the other order."""
    shapes = {
        name.removesuffix(".weight"): shape
        for name, shape in tensors.items()
        if name.endswith(".weight") and len(shape) == 2
    }
    return {
        name.replace(".", "_"): LoraLayer(
            modules={module: shapes[module][0] for module in modules},
            inputs=shapes[modules[0]][1],
            is_swapped=name in swapped,
        )
        for name, modules in ({name: (name,) for name in shapes} | dict(others)).items()
    }
