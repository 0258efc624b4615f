"""A program: updates of a FLUX of true width and few blocks on null GPUs; each rank writes the memory that they took.

training.py FOLDER RANKS SETTINGS     JSON: settings of the recipe
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from clear_dist.launch import env
from clear_dist.launch import ranks as launch

UPDATES, SIDE, TEXT = 2, 64, 512
BLOCKS = {"num_layers": 1, "num_single_layers": 3}


def work(folder: Path, settings: dict[str, Any]) -> None:
    import torch
    from diffusers import FluxTransformer2DModel

    from clear_dist.comm.data_parallel import shard
    from clear_dist.comm.group import Group
    from clear_dist.families.transformers import family_of
    from clear_dist.request.distill import Recipe
    from clear_dist.training.losses import Batch, Weights, losses
    from clear_dist.training.optimisation import Optimisation
    from clear_dist.training.patterns.circle import Circle
    from clear_dist.training.student import Student

    place = env.read()
    group = Group.create(torch.device("cuda", place.local_rank))
    recipe = Recipe(data=folder, **settings)
    torch.set_default_dtype(torch.bfloat16)
    with group.device:
        transformer = FluxTransformer2DModel(guidance_embeds=True, **BLOCKS)
    torch.set_default_dtype(torch.float32)
    pattern = Circle(radius=recipe.window, down_factor=recipe.down_factor)
    student = Student.of(transformer, pattern, (SIDE, SIDE), teacher=recipe.teacher)
    if recipe.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    shard(transformer, family_of(transformer).blocks, group, whole=student.quantised)
    optimisation = Optimisation(student.trained, recipe, group)
    shape, like = (recipe.batch_size, 16, 2 * SIDE, 2 * SIDE), {"device": group.device}
    texts = [torch.zeros(recipe.batch_size, *size, **like) for size in ((TEXT, 4096), (768,))]
    batch = Batch(
        mean=torch.zeros(shape, **like), deviation=torch.zeros(shape, **like), embeddings=texts,
        numbers=range(recipe.batch_size),
    )  # fmt: skip
    for _ in range(UPDATES):
        torch.cuda.reset_peak_memory_stats()
        losses(student, batch, Weights(), seed=0).total.backward()
        optimisation.gather()
        optimisation.step()
    (folder / str(place.rank)).write_text(json.dumps({"allocated": torch.cuda.max_memory_allocated()}))
    group.close()


if __name__ == "__main__":
    where, count, given = sys.argv[1:]
    status = launch.run(partial(work, Path(where), json.loads(given)), nproc=int(count), on_cuda=True, traceback=True)
    sys.exit(status)
