"""A program: FLUX.2 klein 4B's architecture, its weights never filled, on null GPUs; each rank writes what a step took.

flux2.py FOLDER RANKS RUNS     JSON: for each name of a run the side in pixels and options of `parallelize`

Results are FOLDER/name.rank: counts of the last of five steps.

"""

import gc
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from clear_dist.launch import env
from clear_dist.launch import ranks as launch

STEPS, TEXT = 5, 512


def work(folder: Path, runs: dict[str, tuple[int, dict[str, Any]]]) -> None:
    import torch

    from clear_dist.comm.group import Group

    place = env.read()
    group = Group.create(torch.device("cuda", place.local_rank))
    for name, (side, options) in runs.items():
        pipe = pipeline(group.device)
        found = drawn(pipe, group, side, options)
        (folder / f"{name}.{place.rank}").write_text(json.dumps(found))
        del pipe
        gc.collect()
        torch.cuda.empty_cache()
    group.close()


def pipeline(device: Any) -> Any:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel

    from clear_dist.families.flux2.card import KLEIN

    torch.set_default_dtype(torch.bfloat16)
    with device:
        transformer = Flux2Transformer2DModel.from_config(KLEIN.hub_models[0].configs["transformer"])
    torch.set_default_dtype(torch.float32)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    transformer = transformer.eval().requires_grad_(False)
    pipe = Flux2Pipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, group: Any, side: int, options: dict[str, Any]) -> dict[str, Any]:
    import torch

    from clear_dist.parallelize import parallelize
    from tests.cuda.null_gpu import Counts

    handle = parallelize(pipe, group=group, **options)
    torch.cuda.reset_peak_memory_stats()
    counts, steps = Counts(), []

    def end_step(pipeline: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(counts.since_last())
        return {}

    with torch.inference_mode():
        pipe(
            prompt_embeds=torch.randn(1, TEXT, pipe.transformer.config.joint_attention_dim).to(
                group.device, torch.bfloat16
            ),
            height=side,
            width=side,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            callback_on_step_end=end_step,
        )
    found = {
        "step": steps[-1],
        "transport": group.transport,
        "allocated": torch.cuda.max_memory_allocated(),
        "retries": torch.cuda.memory_stats()["num_alloc_retries"],
    }
    handle.close()
    return found


if __name__ == "__main__":
    into, ranks, runs = sys.argv[1:]
    job = partial(work, Path(into), json.loads(runs))
    sys.exit(launch.run(job, nproc=int(ranks), on_cuda=True, traceback=True))
