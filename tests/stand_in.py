"""A stand-in for FLUX.1-dev: the transformer's true key names, shapes and dtype, at any depth; no download.

One block of each kind is 1.09 GB in bfloat16, all of them 23.8 GB. A sparse file takes no room on disk: its tensors are
zeros, its header is what the true one's would be. The other parts are tiny, with the true widths between them.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from tests.tiny import (
    draw_weights,
    make_clip,
    make_clip_tokenizer,
    make_scheduler,
    make_t5,
    make_t5_tokenizer,
    make_vae,
)

FLUX_DEV = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
"""Its transformer/config.json."""
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
STEM = "diffusion_pytorch_model"
NATIVE_SIZE = 1024
DRAWN = 2**24

Shapes = Mapping[str, tuple[int, ...]]


def make_stand_in(
    folder: Path | str,
    *,
    double_blocks: int = 1,
    single_blocks: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    sparse: bool = True,
    clear_radius: int | None = None,
) -> Path:
    """Save a pipeline in diffusers' layout, its transformer's weights in `dtype`, and return its folder.

    Args:
        shards: files of the transformer; with several, an index too.
        sparse: zeros that take no room on disk; otherwise random numbers of a trained model's order of size.
        clear_radius: also a CLEAR checkpoint, `clear_local_<radius>.safetensors`, like `sparse`.
    """
    folder = Path(folder)
    transformer = meta_transformer(double_blocks=double_blocks, single_blocks=single_blocks)
    _small_parts().save_pretrained(folder)
    transformer.save_config(folder / "transformer")
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "FluxTransformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    shapes = {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
    _write_shards(folder / "transformer", shapes, shards, dtype, sparse=sparse)
    if clear_radius is not None:
        parts = (".attn.to_q.", ".attn.to_k.", ".attn.to_v.", ".attn.to_out.0.")
        image_side = {name: shape for name, shape in shapes.items() if any(part in name for part in parts)}
        write_safetensors(folder / f"clear_local_{clear_radius}.safetensors", image_side, dtype, sparse=sparse)
    return folder


def meta_transformer(*, double_blocks: int = 19, single_blocks: int = 38) -> FluxTransformer2DModel:
    """FLUX.1-dev's, on the meta device: shapes and no memory."""
    with init_empty_weights():
        return FluxTransformer2DModel(**FLUX_DEV | {"num_layers": double_blocks, "num_single_layers": single_blocks})


def write_safetensors(file: Path, shapes: Shapes, dtype: torch.dtype, *, sparse: bool = True) -> None:
    """A safetensors file of tensors of these shapes, written tensor by tensor."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        if not sparse:
            numbers = _random(dtype)
            for shape in shapes.values():
                for count in _pieces(math.prod(shape), len(numbers)):
                    stream.write(numbers[:count].view(torch.uint8).numpy().tobytes())
        stream.truncate(8 + len(text) + end)


def _small_parts() -> FluxPipeline:
    tokenizer, tokenizer_2 = make_clip_tokenizer(), make_t5_tokenizer()
    generator = torch.Generator().manual_seed(0)
    return FluxPipeline(
        transformer=None,
        vae=draw_weights(make_vae(NATIVE_SIZE), generator),
        text_encoder=draw_weights(make_clip(tokenizer, FLUX_DEV["pooled_projection_dim"]), generator),
        text_encoder_2=draw_weights(make_t5(len(tokenizer_2), FLUX_DEV["joint_attention_dim"]), generator),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=make_scheduler(),
    )


def _write_shards(folder: Path, shapes: Shapes, shards: int, dtype: torch.dtype, *, sparse: bool) -> None:
    if shards == 1:
        write_safetensors(folder / f"{STEM}.safetensors", shapes, dtype, sparse=sparse)
        return
    files = [f"{STEM}-{shard + 1:05}-of-{shards:05}.safetensors" for shard in range(shards)]
    weight_map = {name: files[number * shards // len(shapes)] for number, name in enumerate(shapes)}
    for file in files:
        own = {name: shape for name, shape in shapes.items() if weight_map[name] == file}
        write_safetensors(folder / file, own, dtype, sparse=sparse)
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _random(dtype: torch.dtype) -> Tensor:
    return (0.02 * torch.randn(DRAWN, generator=torch.Generator().manual_seed(0))).to(dtype)


def _pieces(total: int, most: int) -> Iterator[int]:
    for begin in range(0, total, most):
        yield min(most, total - begin)
