"""Transformers in the layouts that their makers publish: diffusers' converters the other way round, written apart.

Names and shapes alone (tensors on the meta device), or numbers.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]
Rule = tuple[str, str]
FLUX: tuple[Rule, ...] = (
    (r"x_embedder\.", "img_in."),
    (r"context_embedder\.", "txt_in."),
    (r"time_(?:text|guidance)_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
    (r"time_(?:text|guidance)_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
    (r"time_(?:text|guidance)_embed\.guidance_embedder\.linear_1", "guidance_in.in_layer"),
    (r"time_(?:text|guidance)_embed\.guidance_embedder\.linear_2", "guidance_in.out_layer"),
    (r"time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
    (r"time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
    (r"single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
    (r"single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
    (r"single_transformer_blocks\.(\d+)\.norm\.linear", r"single_blocks.\1.modulation.lin"),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
    (r"single_transformer_blocks\.(\d+)\.(?:proj_out|attn\.to_out)\.", r"single_blocks.\1.linear2."),
    (r"transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"double_blocks.\1.img_attn.norm.query_norm.scale"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"double_blocks.\1.img_attn.norm.key_norm.scale"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_added_q\.weight", r"double_blocks.\1.txt_attn.norm.query_norm.scale"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_added_k\.weight", r"double_blocks.\1.txt_attn.norm.key_norm.scale"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
    (r"transformer_blocks\.(\d+)\.ff\.(?:net\.0\.proj|linear_in)", r"double_blocks.\1.img_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff\.(?:net\.2|linear_out)", r"double_blocks.\1.img_mlp.2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.(?:net\.0\.proj|linear_in)", r"double_blocks.\1.txt_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff_context\.(?:net\.2|linear_out)", r"double_blocks.\1.txt_mlp.2"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear", r"double_blocks.\1.img_mod.lin"),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear", r"double_blocks.\1.txt_mod.lin"),
    (r"_modulation(_img|_txt|)\.linear", r"_modulation\1.lin"),
    (r"proj_out\.", "final_layer.linear."),
)
SD3: tuple[Rule, ...] = (
    (r"pos_embed\.pos_embed", "pos_embed"),
    (r"pos_embed\.proj", "x_embedder.proj"),
    (r"time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
    (r"time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
    (r"transformer_blocks\.(\d+)\.(attn2?)\.norm_([qk])\.", r"joint_blocks.\1.x_block.\2.ln_\3."),
    (r"transformer_blocks\.(\d+)\.attn\.norm_added_([qk])\.", r"joint_blocks.\1.context_block.attn.ln_\2."),
    (r"transformer_blocks\.(\d+)\.(attn2?)\.to_out\.0", r"joint_blocks.\1.x_block.\2.proj"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"joint_blocks.\1.context_block.attn.proj"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"joint_blocks.\1.x_block.mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"joint_blocks.\1.x_block.mlp.fc2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"joint_blocks.\1.context_block.mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", r"joint_blocks.\1.context_block.mlp.fc2"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear", r"joint_blocks.\1.x_block.adaLN_modulation.1"),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear", r"joint_blocks.\1.context_block.adaLN_modulation.1"),
    (r"proj_out\.", "final_layer.linear."),
)
Z_IMAGE: tuple[Rule, ...] = (
    (r"all_x_embedder\.2-1\.", "x_embedder."),
    (r"all_final_layer\.2-1\.", "final_layer."),
    (r"attention\.to_out\.0\.", "attention.out."),
    (r"attention\.norm_([qk])\.", r"attention.\1_norm."),
)


def flux(state: Mapping[str, Tensor]) -> State:
    """FLUX.1 and FLUX.2, as Black Forest Labs have them."""
    state = _fused(state, r"(single_transformer_blocks\.\d+)\.attn\.to_q\.(weight|bias)", _single_block)
    state = _fused(
        state, r"(transformer_blocks\.\d+)\.attn\.to_q\.(weight|bias)", _qkv("img", ("to_q", "to_k", "to_v"))
    )
    added = ("add_q_proj", "add_k_proj", "add_v_proj")
    state = _fused(state, r"(transformer_blocks\.\d+)\.attn\.add_q_proj\.(weight|bias)", _qkv("txt", added))
    return _renamed(_final_layer(state), FLUX)


def sd3(state: Mapping[str, Tensor]) -> State:
    """Stable Diffusion 3, as Stability AI has it."""
    for attention in ("attn", "attn2"):
        names = tuple(f"{attention}.{name}" for name in ("to_q", "to_k", "to_v"))
        state = _joint(state, names, f"x_block.{attention}.qkv")
    added = tuple(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj"))
    state = _joint(state, added, "context_block.attn.qkv")
    last = max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    for kind in ("weight", "bias"):
        name = f"transformer_blocks.{last}.norm1_context.linear.{kind}"
        state[name] = _swapped(state[name])
    return _renamed(_final_layer(state), SD3)


def z_image(state: Mapping[str, Tensor]) -> State:
    """Z-Image, as ComfyUI has it."""
    state = dict(state)
    for name in [name for name in state if name.endswith(".attention.to_q.weight")]:
        parts = [state.pop(name.replace("to_q", part)) for part in ("to_q", "to_k", "to_v")]
        state[name.replace("to_q", "qkv")] = torch.cat(parts)
    return _renamed(state, Z_IMAGE)


def _renamed(state: Mapping[str, Tensor], rules: tuple[Rule, ...]) -> State:
    return {_name(name, rules): tensor.contiguous() for name, tensor in state.items()}


def _name(name: str, rules: tuple[Rule, ...]) -> str:
    fitting = (re.sub(f"^{old}", new, name) for old, new in rules if re.match(old, name))
    return next(fitting, re.sub(r"_modulation(_img|_txt|)\.linear", r"_modulation\1.lin", name))


def _fused(state: Mapping[str, Tensor], first: str, fuse: Callable[[State, str, str], None]) -> State:
    state = dict(state)
    for match in [re.fullmatch(first, name) for name in state]:
        if match:
            fuse(state, match[1], match[2])
    return state


def _qkv(side: str, names: tuple[str, ...]) -> Callable[[State, str, str], None]:
    def fuse(state: State, block: str, kind: str) -> None:
        parts = [state.pop(f"{block}.attn.{name}.{kind}") for name in names]
        state[f"double_blocks.{block.split('.')[1]}.{side}_attn.qkv.{kind}"] = torch.cat(parts)

    return fuse


def _single_block(state: State, block: str, kind: str) -> None:
    names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    parts = [state.pop(f"{block}.{name}.{kind}") for name in names]
    state[f"single_blocks.{block.split('.')[1]}.linear1.{kind}"] = torch.cat(parts)


def _joint(state: Mapping[str, Tensor], names: tuple[str, ...], original: str) -> State:
    state = dict(state)
    first = rf"transformer_blocks\.(\d+)\.{re.escape(names[0])}\.(weight|bias)"
    for match in [re.fullmatch(first, name) for name in state]:
        if match:
            parts = [state.pop(f"transformer_blocks.{match[1]}.{name}.{match[2]}") for name in names]
            state[f"joint_blocks.{match[1]}.{original}.{match[2]}"] = torch.cat(parts)
    return state


def _final_layer(state: Mapping[str, Tensor]) -> State:
    state = dict(state)
    for name in [name for name in state if name.startswith("norm_out.linear.")]:
        kind = name.rpartition(".")[2]
        state[f"final_layer.adaLN_modulation.1.{kind}"] = _swapped(state.pop(name))
    return state


def _swapped(tensor: Tensor) -> Tensor:
    """Shift, then scale, of scale, then shift."""
    scale, shift = tensor.chunk(2)
    return torch.cat([shift, scale])


VAE: tuple[Rule, ...] = (
    (r"(encoder|decoder)\.conv_norm_out\.", r"\1.norm_out."),
    (r"(encoder|decoder)\.mid_block\.resnets\.0\.", r"\1.mid.block_1."),
    (r"(encoder|decoder)\.mid_block\.resnets\.1\.", r"\1.mid.block_2."),
    (r"encoder\.down_blocks\.(\d)\.resnets\.(\d)\.", r"encoder.down.\1.block.\2."),
    (r"encoder\.down_blocks\.(\d)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
    *(
        rule
        for block in range(4)
        for rule in (
            (rf"decoder\.up_blocks\.{block}\.resnets\.(\d)\.", rf"decoder.up.{3 - block}.block.\1."),
            (rf"decoder\.up_blocks\.{block}\.upsamplers\.0\.", rf"decoder.up.{3 - block}.upsample."),
        )
    ),
)


def vae(state: Mapping[str, Tensor]) -> State:
    """An AutoencoderKL of four blocks without attention, as in the days of latent diffusion."""
    renamed = _renamed(state, VAE)
    return {name.replace("conv_shortcut", "nin_shortcut"): tensor for name, tensor in renamed.items()}


def clip(state: Mapping[str, Tensor]) -> State:
    """A CLIP text encoder, as in `clip_l.safetensors`."""
    named = {
        name: name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}" for name in state
    }
    return {new: state[old].contiguous() for old, new in named.items()}


def t5(state: Mapping[str, Tensor]) -> State:
    """T5's encoder, as in `t5xxl_fp16.safetensors`."""
    return {name: tensor for name, tensor in state.items() if name != "encoder.embed_tokens.weight"}
