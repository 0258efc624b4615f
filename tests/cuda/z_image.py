"""A program: Z-Image's true size on null GPUs, its weights never filled; each rank writes what it took.

    z_image.py FOLDER MODEL RANKS SIDE OPTIONS     short name; side in tokens; JSON: options of `parallelize`

The transformer is called as its family's plan calls it. Results are FOLDER/rank, of the last of three steps.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from clear_dist.launch import env
from clear_dist.launch import ranks as launch

STEPS, TEXT = 3, 512


def work(folder: Path, model: str, side: int, options: dict[str, Any]) -> None:
    import torch

    from clear_dist.comm.group import Group
    from clear_dist.families.transformers import family_of
    from clear_dist.parallelize import parallelize
    from tests.cuda.null_gpu import Counts

    place = env.read()
    group = Group.create(torch.device("cuda", place.local_rank))
    pipe = make_pipeline(model, group.device)
    handle = parallelize(pipe, group=group, **options)
    family, counts = family_of(pipe.transformer), Counts()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        pipe.scheduler.set_timesteps(STEPS)
        for _ in range(STEPS):
            inputs = family.empty_inputs((side, side), images=1, text_tokens=TEXT)
            pipe.transformer(**inputs)
            step = counts.since_last()
    found = {"step": step, "allocated": torch.cuda.max_memory_allocated(), "transport": group.transport}
    (folder / str(place.rank)).write_text(json.dumps(found))
    handle.close()
    group.close()


def make_pipeline(model: str, device: Any) -> Any:
    """Transformer and scheduler of a model of the hub, by its card."""
    import diffusers
    import torch

    from clear_dist.families.cards import CARDS

    found = CARDS.on_hub(model)
    assert found is not None, model
    card, known = found
    torch.set_default_dtype(torch.bfloat16)  # in float32 it would take twice the memory
    with device:
        transformer = getattr(diffusers, card.transformer).from_config(dict(known.configs["transformer"]))
    torch.set_default_dtype(torch.float32)
    without = dict.fromkeys(card.parts.keys() - {"transformer", "scheduler"})
    scheduler = getattr(diffusers, card.scheduler)()
    return getattr(diffusers, card.pipeline)(
        transformer=transformer.eval().requires_grad_(False), scheduler=scheduler, **without
    )


if __name__ == "__main__":
    into, name, ranks, tokens, chosen = sys.argv[1:]
    job = partial(work, Path(into), name, int(tokens), json.loads(chosen))
    sys.exit(launch.run(job, nproc=int(ranks), on_cuda=True, traceback=True))
