"""A program: generations of a tiny FLUX on null GPUs; each rank writes how often each step has launched a graph.

graph_life.py FOLDER RANKS

Results are FOLDER/life.rank.
"""

import json
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clear_dist.comm.group import Group
from clear_dist.launch import env
from clear_dist.launch import ranks as launch
from clear_dist.parallelize import parallelize
from tests.cuda.null_gpu import Counts
from tests.tiny import CLIP_WIDTH, T5_WIDTH, make_tiny_pipeline
from tests.tiny_controlnet import make_tiny_controlled, make_tiny_controlnet, picture

STEPS, SIDE, TEXT = 6, 160, 9


class Reads(nn.Module):
    """A layer that no capture takes: the host waits for it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.abs().max() >= 0)


class Life:
    def __init__(self, pipe: Any, group: Group, **options: Any) -> None:
        self.pipe = pipe.to(group.device, torch.bfloat16)
        pipe.set_progress_bar_config(disable=True)
        self.handle = parallelize(pipe, group=group, window=4, attention_backend="triton", **options)
        self.counts = Counts()

    def launches(self, pictures: int = 1, **arguments: Any) -> list[int]:
        """Graph launches in each step of a generation."""
        steps: list[int] = []

        def end_step(pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            steps.append(self.counts.since_last()["graph_launches"])
            return {}

        text = torch.zeros(pictures, TEXT, T5_WIDTH, device=self.pipe.device, dtype=torch.bfloat16)
        pooled = torch.zeros(pictures, CLIP_WIDTH, device=self.pipe.device, dtype=torch.bfloat16)
        if "true_cfg_scale" in arguments:
            arguments |= {"negative_prompt_embeds": text, "negative_pooled_prompt_embeds": pooled}
        sizes = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "output_type": "latent"}
        given = {"prompt_embeds": text, "pooled_prompt_embeds": pooled, "callback_on_step_end": end_step}
        self.counts.since_last()
        with torch.inference_mode():
            self.pipe(**{**sizes, **given, **arguments})
        return steps


def drawn(group: Group) -> dict[str, Any]:
    life = Life(make_tiny_pipeline(), group)
    found: dict[str, Any] = {
        "plain": life.launches(),
        "another": life.launches(guidance_scale=7.0),
        "guided": life.launches(true_cfg_scale=2.0),
        "larger": life.launches(height=2 * SIDE),
        "two": life.launches(pictures=2),
        "few steps": life.launches(num_inference_steps=3),
    }
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    life.launches()
    life.launches()
    torch.cuda.empty_cache()
    found["kept"] = torch.cuda.memory_reserved() - before
    norm_out = life.pipe.transformer.norm_out
    stock, norm_out.norm = norm_out.norm, nn.Sequential(norm_out.norm, Reads())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found["reads"] = life.launches()
    found["told"] = [str(each.message) for each in told if "CUDA graphs" in str(each.message)]
    norm_out.norm = stock
    found["again"] = life.launches()
    life.handle.undo()
    found["undone"] = life.launches()
    return found


def controlled(group: Group) -> list[int]:
    life = Life(make_tiny_controlled(make_tiny_controlnet()), group)
    return life.launches(control_image=picture(SIDE // 16, SIDE // 16, 0))


def work(folder: Path) -> None:
    place = env.read()
    group = Group.create(torch.device("cuda", place.local_rank))
    found = drawn(group) | {"controlled": controlled(group)}
    (folder / f"life.{place.rank}").write_text(json.dumps(found))
    group.close()


if __name__ == "__main__":
    into, ranks = sys.argv[1:]
    sys.exit(launch.run(partial(work, Path(into)), nproc=int(ranks), on_cuda=True, traceback=True))
