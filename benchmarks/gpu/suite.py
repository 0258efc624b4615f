"""All that one GPU can tell about clear-dist, in one command and under nine minutes.

    python -m benchmarks.gpu.suite

    correctness  attention in bfloat16 by every backend against float32; a small FLUX on the GPU against the CPU
    ranks        2 and 3 ranks that share the GPU through host memory, and one with NCCL: do they draw the same?
    kernels      one layer's attention: every backend, the official row-major FlexAttention, NATTEN if there, SDPA
    steps        FLUX.1-dev's architecture with random weights: seconds of a step and of one rank's share of it;
                 with --compile ours and diffusers' blocks are compiled, the official row-major code is not
    tuning       what was chosen from counts: tiles of the Triton kernel, graphs, our own kernels, the VAE's attention
    profile      where a step's time goes

Each part runs in a process of its own, for its share of the time and what earlier parts left of theirs. A part that
fails or runs out of time is recorded, its figures so far are kept, and the others go on. Full attention at 8192 px
needs `--parts steps` alone.

Results are in benchmarks/results/<date>-<device>/: summary.json, a file for each part and a trace for
ui.perfetto.dev, none larger than 16 MiB. Nothing is downloaded.

On a CPU (--device cpu --small) it shows that the parts work, and nothing about speed.
"""

import argparse
import multiprocessing
import re
import sys
import time
import traceback
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.session import Journal, Session
from benchmarks.lib.flags import Parser, positive
from benchmarks.lib.machine import machine, name_of
from benchmarks.lib.tables import COMPILED
from clear_dist.observe.report import write

PARTS = {
    "correctness": ("benchmarks.gpu.checks", 100),
    "ranks": ("benchmarks.gpu.checks", 70),
    "kernels": ("benchmarks.gpu.speed", 130),
    "steps": ("benchmarks.gpu.speed", 180),
    "tuning": ("benchmarks.gpu.tuning", 60),
    "profile": ("benchmarks.gpu.speed", 30),
}
"""Module of each part, and its share of the time."""
LEAST_SECONDS = 5.0
"""Least time left for a part to start."""
LARGEST_FILE = 16 * 2**20
RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    options = arguments()
    folder = options.folder or RESULTS / f"{date.today()}-{slug(name_of(torch.device(options.device)))}"
    folder.mkdir(parents=True, exist_ok=True)
    if options.device == "cpu":
        for module in {module for module, _ in PARTS.values()}:
            import_module(module)  # once, since processes are forked
    summary: dict[str, Any] = {"machine": machine(torch.device(options.device)), "parts": {}}
    began, end_of_part = time.time(), 0.0
    whole = sum(share for name, (_, share) in PARTS.items() if name in options.parts)
    for name in options.parts:
        end_of_part += 60 * options.minutes * PARTS[name][1] / whole
        summary["parts"][name] = run_part(name, options, folder, deadline=began + end_of_part)
        print(f"{name}: {summary['parts'][name]}", flush=True)
        write(summary, folder / "summary.json")
    for file in folder.iterdir():
        if file.stat().st_size > LARGEST_FILE:
            print(f"{file.name} is larger than {LARGEST_FILE >> 20} MiB and is deleted")
            file.unlink()
    print(f"{time.time() - began:.0f} s in all; results in {folder.name}/")
    raise SystemExit(any(part["state"] == "failed" for part in summary["parts"].values()))


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--minutes", type=positive, default=8.5, help="for all parts together")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="PART")
    parser.add_argument("--backend", default="auto", help="CLEAR's attention backend in steps and profile")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False, help="blocks, ours and diffusers'"
    )
    parser.add_argument("--folder", type=Path, help="for the results")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can see; nearest: --device cpu --small")
    if options.device == "cpu" and not options.small:
        parser.error("--device cpu is for toy sizes: add --small")
    return options


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run_part(name: str, options: argparse.Namespace, folder: Path, *, deadline: float) -> dict[str, Any]:
    """Run a part in a process; returns its state, seconds and note."""
    began = time.time()
    if deadline - began < LEAST_SECONDS:
        return {"state": "skipped", "seconds": 0.0, "note": "no time is left"}
    # CUDA does not survive a fork.
    context: Any = multiprocessing.get_context("fork" if options.device == "cpu" else "spawn")
    process = context.Process(target=work, args=(name, options, folder, deadline))
    process.start()
    process.join(deadline - began)
    state, note = "done", ""
    if process.exitcode is None:
        process.terminate()  # which its ranks are told of
        process.join(LEAST_SECONDS)
        process.kill()
        process.join()
        state, note = "out of time", "what it had measured is kept"
    elif process.exitcode:
        state, note = "failed", f"exit status {process.exitcode}; its file says more"
    return {"state": state, "seconds": round(time.time() - began, 1), "note": note}


def work(name: str, options: argparse.Namespace, folder: Path, deadline: float) -> None:
    """The work of a part's process; exits with 1 where it or one of its checks failed."""
    device = torch.device(options.device)
    journal = Journal(
        folder / f"{name}.json", {"part": name, "compiled": COMPILED[options.compile], "machine": machine(device)}
    )
    session = Session(device, options.small, options.backend, options.compile, folder, deadline, journal)
    try:
        getattr(import_module(PARTS[name][0]), name)(session)
    except Exception as error:
        journal.tell(error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc().splitlines()[-6:])
        sys.exit(1)
    if any(row.get("passed") is False for row in journal.rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
