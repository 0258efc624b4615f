"""A program: FLUX.1-dev's architecture, its weights never filled, on null GPUs; each rank writes what steps took.

    full_size.py FOLDER RANKS RUNS     JSON: for each name of a run the side in pixels and options of `parallelize`

Results are FOLDER/name.rank. Counts are those of the last of five steps, which is steady; graphs have
been captured in the second one.
"""

import gc
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from clear_dist.launch import env
from clear_dist.launch import ranks as launch

STEPS = 5


def work(folder: Path, runs: dict[str, tuple[int, dict[str, Any]]]) -> None:
    import torch

    from benchmarks.lib.counts import FLUX
    from benchmarks.lib.steps import make_pipeline
    from clear_dist.comm.group import Group

    place = env.read()
    group = Group.create(torch.device("cuda", place.local_rank))
    for name, (side, options) in runs.items():
        pipe = make_pipeline(FLUX, group.device, torch.bfloat16)
        found = drawn(pipe, group, side, options)
        (folder / f"{name}.{place.rank}").write_text(json.dumps(found))
        del pipe
        gc.collect()
        torch.cuda.empty_cache()
    group.close()


def drawn(pipe: Any, group: Any, side: int, options: dict[str, Any]) -> dict[str, Any]:
    import torch

    from benchmarks.lib.counts import FLUX
    from benchmarks.lib.steps import draw
    from clear_dist.parallelize import parallelize
    from tests.cuda.null_gpu import Counts

    handle = parallelize(pipe, group=group, **options)
    torch.cuda.reset_peak_memory_stats()
    counts, steps = Counts(), []
    draw(pipe, FLUX.text_tokens, side, STEPS, lambda: steps.append(counts.since_last()))
    found = {
        "step": steps[-1],
        "transport": group.transport,
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "retries": torch.cuda.memory_stats()["num_alloc_retries"],
    }
    handle.close()
    return found


if __name__ == "__main__":
    into, ranks, runs = sys.argv[1:]
    job = partial(work, Path(into), json.loads(runs))
    sys.exit(launch.run(job, nproc=int(ranks), on_cuda=True, traceback=True))
