"""Windowed attention with PyTorch's FlexAttention: one compiled kernel that visits only blocks the circle touches.

Tokens are copied into the order of tiles (`flex_mask.py`), 2.9 % of a layer of 3072 channels at 8192 px on an H200 by
their bytes. `flex` is PyTorch's kernel in Triton, `flash` FlashAttention 4, where that is installed.

Shape suffixes: B batch, R rows of queries, E rows of keys, W columns, N heads, T text tokens, D head dim,
L queries and S keys in tile order, Y rows of tiles, X columns of tiles, H rows and V columns of a tile.
"""

import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, flex_attention
from torch.nn.functional import pad
from torch.torch_version import TorchVersion

from clear_dist.attention.backend import (
    AMPERE,
    Backend,
    CallShape,
    WindowCall,
    capability,
    is_before_ampere,
    why_too_many_scores,
)
from clear_dist.attention.flex_mask import BLOCK, TILE_COLUMNS, TILE_ROWS, block_mask

FLASH_ROWS = {9: 8, 10: 16}
"""Rows of a query tile by major compute capability: FlashAttention 4 takes 128 queries on Hopper, 256 on Blackwell."""
FLASH_HEAD_DIMS = (64, 96, 128)
"""With wider heads its blocks of keys have another size (its interface.py)."""
FLASH_TORCH = "2.13"
"""Before, FlexAttention returned a wrong log-sum-exp with it (pytorch/pytorch#181645)."""

TILES = {torch.float32: {"BLOCK_M": 32, "BLOCK_N": 16, "num_stages": 2, "num_warps": 4}}
"""FlexAttention's options by dtype where its own are bad: those for float32 spill 2 to 18 KB a thread, take more shared
memory than most GPUs have, and compile for minutes; these spill 0.2 KB (heads of 128) or nothing."""
SHAPES_COMPILED = 64
"""A cascade needs more than Dynamo's limit of 8, beyond which all scores would be held at once."""


def run(
    call: WindowCall,
    *,
    query_rows: int = TILE_ROWS,
    kernel_options: dict[str, Any] | None = None,
    trains: bool = False,
) -> tuple[Tensor, Tensor]:
    """`trains`: with what the backward pass asks of the mask."""
    geometry, device = call.geometry, call.query.device
    attention: Callable[..., tuple[Tensor, AuxOutput]] = _without_values if device.type == "meta" else _unfused
    if device.type == "cuda":
        attention = partial(_compiled(), kernel_options=kernel_options or TILES.get(call.query.dtype))
    with torch._dynamo.config.patch(recompile_limit=SHAPES_COMPILED):
        out_BNLD, aux = attention(
            _tokens(call.key_text[:, :0], call.query, query_rows).transpose(1, 2),
            _tokens(call.key_text, call.key, TILE_ROWS).transpose(1, 2),
            _tokens(call.value_text, call.value, TILE_ROWS).transpose(1, 2),
            block_mask=None if device.type == "meta" else block_mask(geometry, device, query_rows, trains=trains),
            scale=call.scale,
            return_aux=AuxRequest(lse=True),
        )
    assert aux.lse is not None
    results = out_BNLD.transpose(1, 2), aux.lse.transpose(1, 2).unsqueeze(-1)
    out_BRWND, lse_BRWN1 = (_in_raster_order(result, geometry.rows, geometry.columns, query_rows) for result in results)
    return out_BRWND, lse_BRWN1.squeeze(-1).float()


def run_flash(call: WindowCall) -> tuple[Tensor, Tensor]:
    return run(call, query_rows=FLASH_ROWS.get(capability(), TILE_ROWS), kernel_options={"BACKEND": "FLASH"})


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., tuple[Tensor, AuxOutput]]:
    """FlexAttention compiled once per shape; it fails rather than fall back to all scores."""
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _unfused(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, AuxOutput]:
    """FlexAttention without its warning that it holds all scores: `why_not` limits their size."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return flex_attention(query, key, value, **options)


def _without_values(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, AuxOutput]:
    return torch.empty_like(query), AuxOutput(lse=query.new_empty(query.shape[:-1], dtype=torch.float32))


def _tokens(text_BTND: Tensor, image_BEWND: Tensor, tile_rows: int) -> Tensor:
    """[B, S, N, D]: the text padded to whole blocks, then the image, tile after tile, padded to whole tiles."""
    batch, text, heads, head_dim = text_BTND.shape
    padding = 0, 0, 0, 0, 0, -image_BEWND.shape[2] % TILE_COLUMNS, 0, -image_BEWND.shape[1] % tile_rows
    if any(padding):  # `pad` copies in any case
        image_BEWND = pad(image_BEWND, padding)
    image_YHXV = image_BEWND.unflatten(2, (-1, TILE_COLUMNS)).unflatten(1, (-1, tile_rows))
    first_image = -(-text // BLOCK) * BLOCK
    tokens = text_BTND.new_empty(batch, first_image + image_BEWND.shape[1] * image_BEWND.shape[2], heads, head_dim)
    tokens[:, :text] = text_BTND
    tokens[:, text:first_image] = 0
    down, across = image_YHXV.shape[1], image_YHXV.shape[3]
    tiles_YXHV = tokens[:, first_image:].unflatten(1, (down, across, tile_rows, TILE_COLUMNS))
    tiles_YXHV.copy_(image_YHXV.transpose(2, 3))
    return tokens


def _in_raster_order(tokens: Tensor, rows: int, columns: int, tile_rows: int) -> Tensor:
    down, across = -(-rows // tile_rows), -(-columns // TILE_COLUMNS)
    tiles = tokens.unflatten(1, (down, across, tile_rows, TILE_COLUMNS)).transpose(2, 3)
    return tiles.flatten(3, 4).flatten(1, 2)[:, :rows, :columns].contiguous()


def why_not(shape: CallShape) -> str | None:
    if shape.device_type == "cpu":
        return why_too_many_scores(shape)
    if shape.device_type != "cuda":
        return f"it runs on cuda, and for tests on cpu, got {shape.device_type}"
    if shape.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, got {shape.dtype}"
    return f"it takes heads of 16 and more, got {shape.head_dim}" if 0 < shape.head_dim < 16 else None


def lacks(shape: CallShape) -> str | None:
    if shape.device_type == "cuda" and find_spec("triton") is None:
        return "its compiler, the package triton, is not installed"
    if is_before_ampere(shape.device_type):
        return f"its compiler, Triton, needs a GPU of compute capability {AMPERE} or higher, got {capability()}"
    return None


def why_not_flash(shape: CallShape) -> str | None:
    if shape.device_type != "cuda":
        return f"it runs on cuda, got {shape.device_type}"
    if shape.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, got {shape.dtype}"
    if shape.head_dim and shape.head_dim not in FLASH_HEAD_DIMS:
        return f"it takes heads of {', '.join(map(str, FLASH_HEAD_DIMS))}, got {shape.head_dim}"
    return None


def lacks_flash(shape: CallShape) -> str | None:
    if shape.device_type != "cuda":
        return None
    if capability() not in FLASH_ROWS:
        return f"it needs a GPU of compute capability 9 or 10, got {capability()}"
    if TorchVersion(torch.__version__) < FLASH_TORCH:
        return f"it needs torch {FLASH_TORCH} or newer, got {torch.__version__}"
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        return "the package flash-attn-4 is not installed (pip install --pre flash-attn-4)"
    return None


BACKEND = Backend("flex", why_not, run, automatic_on=("cuda",), lacks=lacks)
FLASH_BACKEND = Backend("flash", why_not_flash, run_flash, lacks=lacks_flash)
