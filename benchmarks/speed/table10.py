"""The layout of the paper's Table 10: how long do 50 steps take on N ranks?

    python -m benchmarks.speed.table10 --folder benchmarks/results/2026-11-21-cpu

Starts one rank for each GPU; on a CPU two, of one thread each. What these ranks can do is measured. Beside it, and for
more ranks than were started, stands a projection (lib/share.py): one rank's share is measured on one device, and
communication is bytes over a bandwidth, --gigabytes-per-second or else the one measured between two ranks. DistriFusion
is full attention in the stale schedule; Ulysses and ring attention are diffusers' own. For each size all
settings take turns; figures are medians. With --compile everyone's blocks are compiled, else nothing but kernels of
attention. Results are shown and saved after each size.

A step is measured, and 50 of them are counted, as in the paper: stale rows, DistriFusion among them, have 4 steps in
sync, as long as those of the row without, and 46 stale ones. The paper's figures for this table are not available, nor
which of its cells ran out of memory; those that its caption calls NA are marked.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from diffusers import FluxPipeline

from benchmarks.lib.baselines import Baseline
from benchmarks.lib.cells import BASELINES, DISTRIFUSION, Bench, Place, measure
from benchmarks.lib.flags import positive, whole_number
from benchmarks.lib.share import measured_bandwidth
from benchmarks.lib.steps import make_pipeline, peak_rate
from benchmarks.lib.tables import (
    FULL,
    GIGA,
    Cell,
    Limits,
    free_bytes,
    header_of,
    load,
    model_and_dtype,
    parse,
    parser_of,
    save,
    windows,
)
from benchmarks.speed.table10_shown import columns_of, plot, show_all, show_size
from clear_dist.comm.group import Group
from clear_dist.launch import env
from clear_dist.launch import ranks as launch

NVLINK = 450.0
"""GB/s each way of an H100: the default where there is one GPU."""


def main() -> None:
    parser = parser_of(__doc__)
    devices = torch.cuda.device_count() or 2
    parser.add_argument(
        "--ranks", type=whole_number, default=devices, help="to start, each with a GPU or a core of its own"
    )
    parser.add_argument(
        "--numbers",
        type=whole_number,
        nargs="+",
        default=[1, 2, 4, 8],
        help="of ranks: the columns of the table",
    )
    parser.add_argument("--threads", type=whole_number, default=1, help="of each rank on a CPU")
    parser.add_argument("--gigabytes-per-second", type=positive, help="each way through a rank's link, for projections")
    options = parse(parser, "table10")
    if options.again:
        return show_again(options.folder)
    on_cuda = options.device == "cuda"
    if options.gigabytes_per_second is None and options.ranks == 1 and not on_cuda:
        parser.error("--ranks 1 cannot measure a bandwidth: state --gigabytes-per-second, or use --ranks 2")
    if on_cuda and options.ranks > torch.cuda.device_count():
        parser.error(f"--ranks must be at most the number of GPUs, got {options.ranks}; nearest: {devices}")
    raise SystemExit(launch.run(partial(work, options), nproc=options.ranks, on_cuda=on_cuda, traceback=True))


def show_again(folder: Path) -> None:
    """Show and plot the results in `folder`."""
    header, cells = load(folder, "table10")
    for side in dict.fromkeys(cell.side for cell in cells):
        show_size([cell for cell in cells if cell.side == side], header)
    show_all(cells, header)
    plot(cells, header, folder / "table10.png")


def work(options: argparse.Namespace) -> None:
    """The work of each rank."""
    torch.set_num_threads(options.threads)
    device = torch.device("cuda", env.read().local_rank) if options.device == "cuda" else torch.device("cpu")
    world = Group.create(device, timeout_seconds=7200.0)
    bench = prepare(options, world)
    header = header_of(options, bench.limits, device) | {
        "gigabytes_per_second": bench.bytes_per_second / GIGA,
        "bandwidth": "stated" if options.gigabytes_per_second or world.size == 1 else "measured",
        "all_at_once": [],
    }
    cells: list[Cell] = []
    for side in options.sides:
        found = measure(side, bench)
        cells += found
        alone, together = peaks(world, bench.pipe.transformer.dtype)
        header["peak"] = max(header["peak"], alone)
        header["all_at_once"].append(together / alone)
        if world.rank == 0:  # after each size: the next may take hours
            show_size(found, header)
        if world.rank == 0 and options.folder is not None:
            save(options.folder, "table10", header, cells, columns_of(cells))
            plot(cells, header, options.folder / "table10.png")
    if world.rank == 0:
        show_all(cells, header)
    world.barrier()
    world.close()


def prepare(options: argparse.Namespace, world: Group) -> Bench:
    (model, dtype), first = model_and_dtype(options), world.rank == 0
    pipe = make_pipeline(model, world.device, dtype)
    numbers = sorted({number for number in (*options.numbers, 2) if number <= world.size})
    groups = {number: world.split(number) if number < world.size else world for number in numbers}
    # One rank at a time, and the same figures on all: what is left out follows from them.
    peak, free = world.broadcast_object((peak_rate(world.device, dtype), free_bytes(world.device)) if first else None)
    return Bench(
        pipe=pipe,
        world=world,
        limits=Limits(model, options.cell_seconds, options.repetitions, peak, free),
        settings=(FULL, DISTRIFUSION, *windows(options.radii), *windows(options.radii, "stale")),
        numbers=sorted(set(options.numbers)),
        groups=groups,
        baselines=make_baselines(pipe, [number for number in numbers if number > 1], world, options.compile),
        bytes_per_second=bandwidth(options, groups, world),
        compile=options.compile,
    )


def make_baselines(pipe: FluxPipeline, numbers: list[int], world: Group, compile: bool) -> dict[Place, Baseline]:
    return {
        Place(setting=setting, ranks=number): Baseline(pipe, kind, number, world, compile=compile)
        for kind, setting in BASELINES.items()
        for number in numbers
        if not world.size % number
    }


def peaks(world: Group, dtype: torch.dtype) -> tuple[float, float]:
    """Peak rate of the first rank alone, and the lowest while all ranks work: they share one machine's resources."""
    alone = world.broadcast_object(peak_rate(world.device, dtype) if world.rank == 0 else None)
    return alone, min(world.gather_objects(peak_rate(world.device, dtype)))


def bandwidth(options: argparse.Namespace, groups: dict[int, Group], world: Group) -> float:
    """Bytes per second each way between two ranks."""
    if options.gigabytes_per_second is not None:
        return GIGA * options.gigabytes_per_second
    if world.size == 1:
        return GIGA * NVLINK
    mine = measured_bandwidth(groups[2]) if world.rank < 2 else None
    return world.broadcast_object(mine)


if __name__ == "__main__":
    main()
