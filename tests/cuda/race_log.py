"""A program: a tiny FLUX on stripes over null NCCL; each rank logs what every operation and message reads and writes.

    race_log.py FOLDER RANKS RUNS     JSON: options of `parallelize` by name of the run, beside them perhaps `fault`

Logs are FOLDER/name.rank, that of the group's first messages FOLDER/connecting.rank. A fault is put in on purpose, for `races.py` to find.
"""

import ctypes
import json
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clear_dist.comm import halo_exchange
from clear_dist.comm.group import Group
from clear_dist.families.flux.sample import FluxSample
from clear_dist.kernels import elementwise, merging
from clear_dist.launch import env
from clear_dist.launch import ranks as launch
from clear_dist.parallelize import parallelize

GRID = (13, 9)
FAULTS: dict[str | None, AbstractContextManager[Any]] = {
    None: nullcontext(),
    # A stream of its own reduces text before it is there.
    "aside": patch.object(torch.cuda.Stream, "wait_stream", lambda self, other: None),
    # Halos are read before they have arrived.
    "halos": patch.object(halo_exchange, "_wait_for", lambda *about: None),
}
NOTHING_HAPPENS = ("aten::empty", "aten::new_empty", "aten::record_stream", "c10d")


class Log(TorchDispatchMode):
    """Writes each operation's stream and memory to the stubs' log."""

    def __init__(self, note: Any) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        out = function(*args, **given)
        reads: list[str] = []
        writes: list[str] = []
        for number, argument in enumerate(function._schema.arguments):
            value = args[number] if number < len(args) else given.get(argument.name)
            changes = argument.alias_info is not None and argument.alias_info.is_write
            (writes if changes else reads).extend(places(value))
        had = {x.untyped_storage()._cdata for x in tensors((args, given))}
        fresh = [x for x in tensors(out) if x.untyped_storage()._cdata not in had]
        is_view = not fresh and not writes
        if not is_view and not function.name().startswith(NOTHING_HAPPENS):
            self._write(function.name(), reads, [*writes, *places(fresh)])
        return out

    def launches_of(self, kernels: ModuleType) -> AbstractContextManager[Any]:
        """Our own kernels in the log, which torch does not dispatch."""
        return patch.object(kernels, "_launch", partial(self._launched, kernels._launch))

    def _launched(self, launch: Any, kernel: str, read: Any, written: Any, *rest: Any, **named: Any) -> None:
        self._write(kernel, places(read), places(written))
        launch(kernel, read, written, *rest, **named)

    def _write(self, name: str, reads: list[str], writes: list[str]) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        self._note(f"op {name} stream {stream} R {';'.join(reads)} W {';'.join(writes)}".encode())


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def places(tree: Any) -> list[str]:
    """First byte and number of bytes from there to the last, of each tensor on a GPU."""
    on_gpu = [x for x in tensors(tree) if x.is_cuda and x.numel()]
    lasts = [sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) for x in on_gpu]
    return [f"{x.data_ptr()},{(last + 1) * x.element_size()}" for x, last in zip(on_gpu, lasts, strict=True)]


class LongerSample(FluxSample):
    steps = 5


def work(folder: Path, runs: dict[str, dict[str, Any]]) -> None:
    place = env.read()
    stubs, sample = ctypes.CDLL("libnullrt.so"), LongerSample()
    stubs.nullcuda_log(str(folder / f"connecting.{place.rank}").encode())
    group = Group.create(torch.device("cuda", place.local_rank))
    stubs.nullcuda_log(None)
    for name, options in runs.items():
        file = folder / f"{name}.{place.rank}"
        with FAULTS[options.pop("fault", None)], torch.inference_mode():
            pipe = sample.pipeline(group.device, torch.bfloat16)
            handle = parallelize(pipe, group=group, cuda_graphs="off", **options)  # a replay tells nobody what it does
            sample.draw(pipe, GRID)  # buffers are made
            stubs.nullcuda_log(str(file).encode())
            log = Log(stubs.nullcuda_note)
            with log, log.launches_of(elementwise), log.launches_of(merging):
                sample.draw(pipe, GRID)
                sample.draw(pipe, GRID)
            handle.drain()
            stubs.nullcuda_log(None)
            handle.undo()
    group.close()


if __name__ == "__main__":
    into, ranks, runs = sys.argv[1:]
    job = partial(work, Path(into), json.loads(runs))
    sys.exit(launch.run(job, nproc=int(ranks), on_cuda=True, traceback=True))
