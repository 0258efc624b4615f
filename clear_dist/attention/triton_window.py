"""Windowed attention with a Triton kernel of our own: raster order in and out, no mask in memory, halos read in place.

Working memory is a table of two numbers for each row of tiles that the circle touches. On a CPU it runs under Triton's
interpreter, for tests: TRITON_INTERPRET=1 before Python starts.

Shape suffixes: B batch, R rows of queries, E rows of keys, W columns, N heads, T text tokens, D head dim.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from math import log2
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clear_dist.attention.backend import Backend, CallShape, WindowCall
from clear_dist.geometry import covering_radius, reached_tiles
from clear_dist.kernels import shared_memory, usable

LARGEST_RADIUS = 4_000
"""In tokens; up to here float32 holds the squared distances that the kernel compares."""
HEAD_DIMS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Tiling:
    """Tiles of one program, (rows, columns) in tokens; text keys come in blocks as large as `keys`."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    warps: int
    stages: int
    """Tiles of keys and values under way at once."""


TILINGS = Path(__file__).with_name("tilings.json")
"""Made by `benchmarks/gpu/tilings.py` from what the kernel takes when compiled; not measured on a GPU."""
LEAST_SHARED_MEMORY = 99 * 1024
"""Bytes for one program on GPUs of compute capability 8.6, 8.9 and 12.x, fewer than on the others from 8.0 on."""


def run(call: WindowCall) -> tuple[Tensor, Tensor]:
    out_BRWND = call.query.new_empty(call.query.shape) if call.out is None else call.out
    lse_BRWN = call.query.new_empty(call.query.shape[:-1], dtype=torch.float32)
    _launch(call, out_BRWND, lse_BRWN, extends=False)
    return out_BRWND, lse_BRWN


def extend(call: WindowCall, lse_BRWN: Tensor) -> None:
    assert call.out is not None, "nothing to extend"
    _launch(call, call.out, lse_BRWN, extends=True)


def _launch(call: WindowCall, out_BRWND: Tensor, lse_BRWN: Tensor, *, extends: bool) -> None:
    tiling = choose_tiling(call.query.shape[-1], call.query.dtype, architecture(call.query.device.type))
    grid, arguments, options = launch_options(call, out_BRWND, lse_BRWN, tiling, extends=extends)
    if call.query.is_meta:
        return
    from clear_dist.attention.triton_kernel import window_kernel

    with torch.cuda.device_of(call.query):
        window_kernel[grid](*arguments, **options)


def launch_options(
    call: WindowCall, out_BRWND: Tensor, lse_BRWN: Tensor, tiling: Tiling, *, extends: bool
) -> tuple[tuple[int, int], tuple[Any, ...], dict[str, Any]]:
    """Grid, positional arguments and options of the kernel for a call."""
    batch, rows, columns, heads, head_dim = call.query.shape
    radius = min(call.radius, _largest_distance(call))
    assert radius <= LARGEST_RADIUS, f"a circle of {radius} tokens is beyond float32"
    first, tiles = tile_table(radius, tiling.queries, tiling.keys, call.query.device)
    tensors = (call.query, call.key, call.value, call.key_text, call.value_text, out_BRWND, lse_BRWN)
    options = {
        "heads": heads,
        "rows": rows,
        "key_rows": call.key.shape[1],
        "columns": columns,
        "text": call.key_text.shape[1],
        "row_offset": call.row_offset,
        "radius": radius,
        "log2_scale": call.scale * log2(torch.e),
        "QUERIES": tiling.queries,
        "KEYS": tiling.keys,
        "FIRST": first,
        "ROWS": len(tiles) - 1,
        "HEAD_DIM": head_dim,
        "EXTENDS": extends,
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
    }
    tile_count = -(-rows // tiling.queries[0]) * -(-columns // tiling.queries[1])
    return (tile_count, batch * heads), (*tensors, tiles, *(tensor.stride() for tensor in tensors)), options


def choose_tiling(head_dim: int, dtype: torch.dtype, architecture: int) -> Tiling:
    """Tiles of the newest architecture in the table that is not newer than this one; the oldest's where there is none.

    `architecture`: ten times the compute capability.
    """
    table = tilings()
    rows = table[max((known for known in table if known <= architecture), default=min(table))]
    key_bytes = head_dim * (8 if dtype == torch.float32 else 2)  # float32 lies in registers as two halves
    return rows[min(most for most in rows if key_bytes <= most)]


@lru_cache(maxsize=1)
def tilings() -> dict[int, dict[int, Tiling]]:
    """Tilings by architecture and by the most bytes of one key of one head."""
    return {
        int(architecture): {
            int(most): Tiling(tuple(row["queries"]), tuple(row["keys"]), row["warps"], row["stages"])
            for most, row in rows.items()
        }
        for architecture, rows in json.loads(TILINGS.read_text())["tilings"].items()
    }


def architecture(device_type: str) -> int:
    """Ten times this process's compute capability; 0 where there is no GPU."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


@lru_cache(maxsize=16)
def tile_table(
    radius: int, query_tile: tuple[int, int], key_tile: tuple[int, int], device: torch.device
) -> tuple[int, Tensor]:
    """First row of tiles that circles touch; int32 [rows + 1, 2]: first column, one after the last; a row to spare."""
    reached = reached_tiles(radius, query_tile, key_tile)
    ends = [(columns.start, columns.stop) for columns in reached.values()]
    return min(reached), torch.tensor([*ends, (0, 0)], dtype=torch.int32, device=device)


def _largest_distance(call: WindowCall) -> int:
    rows, key_rows = call.query.shape[1], call.key.shape[1]
    span = max(call.row_offset + rows, key_rows) - min(call.row_offset, 0)
    return covering_radius(span, call.query.shape[2])


def why_not(shape: CallShape) -> str | None:
    if shape.device_type not in ("cpu", "cuda"):
        return f"it runs on cuda, and for tests on cpu, got {shape.device_type}"
    if shape.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, got {shape.dtype}"
    if shape.square:
        return "its windows are circles"
    if shape.head_dim and shape.head_dim not in HEAD_DIMS:
        return f"it takes heads of {', '.join(map(str, HEAD_DIMS))}, got {shape.head_dim}"
    return None


def lacks(shape: CallShape) -> str | None:
    if shape.device_type not in ("cpu", "cuda"):
        return None
    if find_spec("triton") is None:
        return "its compiler, the package triton, is not installed"
    if (found := shared_memory(shape.device_type)) < LEAST_SHARED_MEMORY:
        least, found = LEAST_SHARED_MEMORY // 1024, found // 1024
        return f"it needs a GPU with {least} KiB of shared memory, of compute capability 8 or higher, got {found} KiB"
    if shape.device_type == "cpu" and not usable("cpu"):
        return "on cpu it runs in Triton's interpreter only, for tests: TRITON_INTERPRET=1"
    return None


BACKEND = Backend("triton", why_not, run, lacks=lacks, extend=extend)
