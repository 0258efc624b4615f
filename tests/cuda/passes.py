"""A program: one block of each kind, as wide as FLUX.1-dev's, on a null GPU; writes numbers per channel and token.

passes.py FILE SIDE     JSON: for each form of the parts those of a double and of a single block
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.lib.counts import FLUX
from benchmarks.lib.passes import Passes
from benchmarks.lib.steps import make_pipeline
from clear_dist.engine.fused import choose_parts
from clear_dist.engine.parts import Parts
from clear_dist.engine.striped import require_striped
from clear_dist.families.flux.transformer import Flux
from clear_dist.parallelize import parallelize


def main(file: Path, side: int) -> None:
    model, tokens = replace(FLUX, double_blocks=1, single_blocks=1), (side // 16) ** 2
    pipe = make_pipeline(model, torch.device("cuda"), torch.bfloat16)
    parallelize(pipe, window=16, attention_backend="triton")
    striped, family = require_striped(pipe), Flux(pipe.transformer)
    inputs = family.empty_inputs((side // 16, side // 16), images=1, text_tokens=model.text_tokens)
    inputs["img_ids"] = pipe._prepare_latent_image_ids(1, side // 16, side // 16, pipe.device, torch.bfloat16)
    pipe.scheduler.set_timesteps(1)
    forms = {
        "torch": Parts(),
        "eager": choose_parts("cuda", compile=False),
        "compiled": choose_parts("cuda", compile=True),
    }
    found = {}
    for name, parts in forms.items():
        striped.parts = parts
        passes = Passes(family.blocks)
        with torch.no_grad(), passes.counting():
            pipe.transformer(**inputs)
        numbers = model.channels * (tokens + model.text_tokens) * model.itemsize
        found[name] = [passes.bytes[block] / numbers for block in range(2)]
    file.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
