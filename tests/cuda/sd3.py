"""A program: SD3.5's architectures, weights never filled, on null GPUs; each rank writes what steps took.

    sd3.py FOLDER RANKS RUNS     JSON: for each name of a run the model, the side in pixels and options of `parallelize`

Results are FOLDER/name.rank, counts those of the last of five steps, which is steady.
"""

import gc
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from clear_dist.launch import env
from clear_dist.launch import ranks as launch

STEPS, TEXT_TOKENS = 5, 77 + 256


def work(folder: Path, runs: dict[str, tuple[str, int, dict[str, Any]]]) -> None:
    import torch

    from clear_dist.comm.group import Group

    place = env.read()
    group = Group.create(torch.device("cuda", place.local_rank))
    for name, run in runs.items():
        (folder / f"{name}.{place.rank}").write_text(json.dumps(drawn(group, *run)))
        gc.collect()
        torch.cuda.empty_cache()
    group.close()


def full_size(model: str, device: Any) -> Any:
    """The pipeline of a hub's model without text encoders and VAE."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    from clear_dist.families.cards import CARDS

    found = CARDS.on_hub(model)
    assert found is not None, model
    torch.set_default_dtype(torch.bfloat16)
    with device:
        transformer = SD3Transformer2DModel(**found[1].configs["transformer"]).to(torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    names = ("vae", *(f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")))
    transformer.eval().requires_grad_(False)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, **dict.fromkeys(names))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(group: Any, model: str, side: int, options: dict[str, Any]) -> dict[str, Any]:
    import torch

    from clear_dist.parallelize import parallelize
    from tests.cuda.null_gpu import Counts

    pipe = full_size(model, group.device)
    gc.collect()
    handle = parallelize(pipe, group=group, **options)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    counts, steps, config = Counts(), [], pipe.transformer.config
    text = torch.randn(1, TEXT_TOKENS, config.joint_attention_dim).to(group.device, torch.bfloat16)
    pooled = torch.randn(1, config.pooled_projection_dim).to(group.device, torch.bfloat16)

    def end_step(*_: Any) -> dict[str, Any]:
        steps.append(counts.since_last())
        return {}

    with torch.inference_mode():
        pipe(
            prompt_embeds=text, pooled_prompt_embeds=pooled, negative_prompt_embeds=text.clone(),
            negative_pooled_prompt_embeds=pooled.clone(), height=side, width=side, num_inference_steps=STEPS,
            guidance_scale=4.0, generator=torch.Generator().manual_seed(0), output_type="latent",
            callback_on_step_end=end_step, callback_on_step_end_tensor_inputs=["latents"],
        )  # fmt: skip
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
