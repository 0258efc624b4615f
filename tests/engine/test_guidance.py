"""Guidance ranks: half of the ranks takes each pass, or half of the batch; against unmodified pipelines, and one rank."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from clear_dist import parallelize
from clear_dist.comm.group import Group
from clear_dist.parallelized import Parallelized
from tests.families.flux2.tiny import make_tiny_klein
from tests.families.sd3.tiny import make_tiny_pipeline as make_tiny_sd3
from tests.families.z_image.tiny import make_tiny_z_image
from tests.ranks import run_ranks
from tests.test_parallelize import relative_error
from tests.tiny import make_tiny_pipeline

HEIGHT, WIDTH, STEPS = 144, 96, 4
NEGATIVE = "fog over all of it"
"""Longer than the prompt, so that passes have texts of two lengths where nothing is padded."""
WINDOWED: dict[str, Any] = {"window": 3, "text_attention": "exact", "cut": "columns"}
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "flux": (make_tiny_pipeline, {"true_cfg_scale": 3.0}),
    "flux2": (partial(make_tiny_klein, is_distilled=False), {"guidance_scale": 3.0}),
    "sd3": (partial(make_tiny_sd3, "medium"), {"guidance_scale": 3.0}),
    "z_image": (make_tiny_z_image, {"guidance_scale": 3.0}),
}


def draw(name: str, pipe: Any, **changed: Any) -> Tensor:
    guided = {"negative_prompt": NEGATIVE} if name != "flux2" else negative_embeddings(pipe)
    given = MODELS[name][1] | guided | {"prompt": "a hill", "num_inference_steps": STEPS, "max_sequence_length": 32}
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        **given | changed, height=HEIGHT, width=WIDTH, output_type="latent", generator=torch.Generator().manual_seed(7)
    ).images


@torch.no_grad()
def negative_embeddings(pipe: Any) -> dict[str, Tensor]:
    """Klein's pipelines take them only so."""
    return {"negative_prompt_embeds": pipe.encode_prompt(NEGATIVE, max_sequence_length=32)[0]}


@cache
def stock(name: str) -> Tensor:
    return draw(name, MODELS[name][0]())


def on_ranks(pipe: Any, group: Group, **options: Any) -> Parallelized:
    return parallelize(pipe, group=group, guidance_ranks=2 if group.size > 1 else 1, **options)


def drawn(group: Group) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, (make, _) in MODELS.items():
        pipe, of_model = make(), found.setdefault(name, {})
        handle = on_ranks(pipe, group, window="full")
        of_model["full"] = draw(name, pipe)
        of_model["stripes"], of_model["comm"] = handle.stripes, handle.counters.as_dict()
        handle.undo()
        handle = on_ranks(pipe, group, **WINDOWED)
        of_model["windowed"] = draw(name, pipe)
        handle.undo()
    return found


@pytest.fixture(scope="module")
def found() -> dict[int, list[dict[str, dict[str, Any]]]]:
    return {size: run_ranks(drawn, size) for size in (1, 2, 4)}


@pytest.mark.parametrize("name", MODELS)
def test_predictions_of_both_halves_are_those_of_one_rank(name: str, found: dict[int, list[Any]]) -> None:
    for size, ranks in found.items():
        for rank in ranks:
            assert relative_error(rank[name]["full"], stock(name)) < 1e-4, size
            assert relative_error(rank[name]["windowed"], found[1][0][name]["windowed"]) < 1e-4, size
