"""What the Triton kernel takes on each architecture, by tiling, compiled without a GPU; makes its table of tilings.

    python -m benchmarks.gpu.tilings --json tilings.json --table clear_dist/attention/tilings.json
    python -m benchmarks.gpu.tilings --measured tuning.json --table clear_dist/attention/tilings.json

Needs an environment with Triton; Triton's own ptxas says registers and spilled bytes. Nothing runs and no time is
measured: what the table has is a guess from counts, by `rank`. The second form puts there instead what suite.py has
timed on a GPU.
"""

import json
import re
import subprocess
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import triton
from rich.console import Console
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.lib.flags import Parser
from clear_dist.attention.backend import WindowCall
from clear_dist.attention.triton_kernel import window_kernel
from clear_dist.attention.triton_window import Tiling, launch_options
from clear_dist.geometry import half_widths, reached_tiles

RULE = (
    "fits shared memory; least spilled bytes a thread above 32; then the largest share of useful pairs at radius 16, "
    "times 0.8 with one program an SM, times 0.8 with tiles of fewer than 64 keys; the factors are guesses"
)
RADII = (8, 16, 32)
KIB = 1024


@dataclass(frozen=True)
class Sm:
    """KiB of shared memory of a multiprocessor and of one program, and threads (CUDA C++ Programming Guide)."""

    shared: int
    program: int
    threads: int


SMS = {
    80: Sm(164, 163, 2048),
    86: Sm(100, 99, 1536),
    89: Sm(100, 99, 1536),
    90: Sm(228, 227, 2048),
    100: Sm(228, 227, 2048),
    120: Sm(100, 99, 1536),
}
HALF, WHOLE = torch.bfloat16, torch.float32
KINDS = {
    128: [(64, HALF)],
    256: [(128, HALF)],
    512: [(256, HALF), (64, WHOLE)],
    1024: [(128, WHOLE)],
    2048: [(256, WHOLE)],
}
"""Heads by bytes of one key; float32 counts twice, because it lies in registers as two halves."""


def candidates(stages: int) -> dict[int, list[Tiling]]:
    """Tilings to compile by bytes of a key; `stages`: as many large tiles as shared memory has room for."""
    return {
        128: [Tiling((8, 16), (8, 16), 8, stages), Tiling((8, 8), (8, 8), 4, 3)],
        256: [
            Tiling((8, 16), (8, 8), 8, stages),
            Tiling((8, 8), (8, 8), 4, stages),
            Tiling((8, 16), (4, 8), 8, 3),
            Tiling((8, 8), (4, 8), 4, 3),
            Tiling((8, 8), (4, 8), 8, 3),
        ],
        512: [Tiling((8, 8), (4, 8), 8, 2), Tiling((8, 8), (4, 8), 4, 2)],
        1024: [Tiling((4, 8), (4, 4), 4, 2), Tiling((4, 4), (4, 4), 4, 2)],
        2048: [Tiling((4, 4), (4, 4), 4, 2)],
    }


@dataclass(frozen=True)
class AbsentGpu:
    """What Triton asks a driver before it compiles."""

    architecture: int

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps what it compiled by this number

    def get_current_stream(self, device: int) -> int:
        return 0


def call_of(head_dim: int, dtype: torch.dtype) -> WindowCall:
    """A stripe of a layer with text before the image in the same tensor, radius 16."""
    query, key, value = (torch.empty(1, 512 + 16 * 64, 24, head_dim, dtype=dtype) for _ in range(3))
    query, key_image, value_image = (x[:, 512:].unflatten(1, (16, 64)) for x in (query, key, value))
    texts = {"key_text": key[:, :512], "value_text": value[:, :512]}
    return WindowCall(query=query, key=key_image, value=value_image, **texts, radius=16, row_offset=0, scale=0.1)


def taken(architecture: int, tiling: Tiling, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Registers and spilled bytes of a thread, bytes of shared memory and programs that an SM has room for."""
    driver.set_active(AbsentGpu(architecture))
    call = call_of(head_dim, dtype)
    lse = call.query.new_empty(call.query.shape[:-1], dtype=torch.float32)
    grid, arguments, options = launch_options(call, torch.empty_like(call.query), lse, tiling, extends=False)
    compiled = window_kernel.warmup(*arguments, grid=grid, **options)
    with NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.findall(rf"{name}:(\d+)", told)[0]) for name in ("REG", "STACK", "LOCAL"))
    sm, shared, threads = SMS[architecture], compiled.metadata.shared, 32 * tiling.warps
    rooms = sm.shared * KIB // (shared + KIB), 65_536 // (-(-registers // 8) * 8 * threads), sm.threads // threads
    programs = min(rooms) if shared <= sm.program * KIB else 0
    return {"registers": registers, "spilled": stack + local, "shared": shared, "programs": programs}


def useful(tiling: Tiling, radius: int) -> float:
    """Share of pairs inside the circle among those of the tiles that a tile of queries visits, far from borders."""
    tiles = sum(len(columns) for columns in reached_tiles(radius, tiling.queries, tiling.keys).values())
    widths = half_widths(radius)
    circle = sum(2 * widths[abs(dy)] + 1 for dy in range(1 - radius, radius))
    return circle / (tiles * tiling.keys[0] * tiling.keys[1])


def rank(row: dict[str, Any]) -> tuple[bool, int, float]:
    """RULE, the best row last."""
    small = row["keys"][0] * row["keys"][1] < 64
    score = row["useful"][16] * (0.8 if row["programs"] < 2 else 1) * (0.8 if small else 1)
    return row["programs"] > 0, -max(0, row["spilled"] - 32), score


def rows_of(architecture: int, most: int, tilings: list[Tiling], show: Any) -> list[dict[str, Any]]:
    """A row for each tiling; where several heads share one, the most that any of them takes."""
    rows = []
    for tiling in tilings:
        found = [taken(architecture, tiling, *kind) for kind in KINDS[most]]
        worst = {name: max(row[name] for row in found) for name in ("registers", "spilled", "shared")}
        shares = {radius: round(useful(tiling, radius), 3) for radius in RADII}
        programs = min(row["programs"] for row in found)
        rows.append({**asdict(tiling), **worst, "programs": programs, "useful": shares})
        show(f"sm_{architecture}, keys of {most} bytes: {rows[-1]}")
    return rows


def with_measured(table: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The table with the fastest tiling of each architecture and size of keys that was timed."""
    timed = [row for row in rows if "tiling" in row and "seconds" in row]
    tilings = {name: dict(kinds) for name, kinds in table["tilings"].items()}
    fastest = {}
    for row in sorted(timed, key=lambda row: -row["seconds"]):
        fastest[row["architecture"], row["key_bytes"]] = row["tiling"]
    for (sm, most), tiling in fastest.items():
        older = max((known for known in map(int, table["tilings"]) if known <= sm), default=min(SMS))
        tilings.setdefault(str(sm), dict(table["tilings"][str(older)]))[str(most)] = tiling
    measured = [*(table["measured"] or ()), *(f"sm_{sm}, {most} bytes" for sm, most in fastest)]
    return {**table, "measured": sorted(set(measured)), "tilings": tilings}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file for all rows")
    parser.add_argument("--measured", type=Path, help="rows of suite.py's part tuning; nothing is compiled")
    parser.add_argument("--table", type=Path, help="file for the tilings that the kernel is to use")
    flags = parser.parse_args()
    if flags.measured:
        if not flags.table:
            parser.error("--measured needs --table, the file to put the fastest tilings into")
        table = with_measured(json.loads(flags.table.read_text()), json.loads(flags.measured.read_text())["rows"])
        flags.table.write_text(json.dumps(table, indent=1) + "\n")
        return
    show = partial(Console().print, soft_wrap=True, highlight=False)
    rows = {}
    for sm, limits in SMS.items():
        tried = candidates(stages=3 if limits.program > 99 else 2)
        rows[sm] = {most: rows_of(sm, most, tilings, show) for most, tilings in tried.items()}
    about = {"rule": RULE, "versions": {"triton": triton.__version__, "torch": torch.__version__}}
    if flags.json:
        flags.json.write_text(json.dumps({**about, "measured": False, "rows": rows}, indent=1) + "\n")
    if flags.table:
        names = "queries", "keys", "warps", "stages"
        chosen = {
            sm: {most: {name: max(found, key=rank)[name] for name in names} for most, found in kinds.items()}
            for sm, kinds in rows.items()
        }
        flags.table.write_text(json.dumps({**about, "measured": False, "tilings": chosen}, indent=1) + "\n")


if __name__ == "__main__":
    main()
