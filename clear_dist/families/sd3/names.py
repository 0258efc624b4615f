"""Stability AI's own names of layers, as ComfyUI's and kohya's files of LoRA have them."""

import re
from collections.abc import Collection, Iterator

QKV = ("to_q", "to_k", "to_v")
SIDES = {
    "x_block": (QKV, "to_out.0", "ff", "norm1"),
    "context_block": (("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context", "norm1_context"),
}
"""Diffusers' names in a block: attention's inputs and output, MLP, modulation."""
AROUND = {
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
ORIGINALS = {
    r"pos_embed": r"pos_embed.pos_embed",
    r"x_embedder\.proj\.(weight|bias)": r"pos_embed.proj.\1",
} | {
    rf"joint_blocks\.(\d+)\.{original}\.ln_([qk])\.weight": rf"transformer_blocks.\1.{norm}_\2.weight"
    for original, norm in {
        r"x_block\.attn": "attn.norm",
        r"context_block\.attn": "attn.norm_added",
        r"x_block\.attn2": "attn2.norm",
    }.items()
}
"""Patterns of the names of what is no linear layer, with diffusers' names."""
BLOCK = re.compile(r"transformer_blocks\.(\d+)\.norm1\.linear")


def original_layers(layers: Collection[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Name of each layer, and diffusers' names, among `layers`, of those that it consists of."""
    yield from ((original, (name,)) for original, name in AROUND.items())
    for index in [match[1] for match in map(BLOCK.fullmatch, layers) if match]:
        for original, modules in _of_block(f"transformer_blocks.{index}", f"joint_blocks.{index}"):
            if modules[0] in layers:  # the last block ends its text, few have a second attention
                yield original, modules


def _of_block(block: str, original: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for side, (qkv, out, mlp, norm) in SIDES.items():
        yield f"{original}.{side}.attn.qkv", tuple(f"{block}.attn.{name}" for name in qkv)
        yield f"{original}.{side}.attn.proj", (f"{block}.attn.{out}",)
        yield f"{original}.{side}.mlp.fc1", (f"{block}.{mlp}.net.0.proj",)
        yield f"{original}.{side}.mlp.fc2", (f"{block}.{mlp}.net.2",)
        yield f"{original}.{side}.adaLN_modulation.1", (f"{block}.{norm}.linear",)
    yield f"{original}.x_block.attn2.qkv", tuple(f"{block}.attn2.{name}" for name in QKV)
    yield f"{original}.x_block.attn2.proj", (f"{block}.attn2.to_out.0",)
