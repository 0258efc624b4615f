"""Guidance ranks: each half of the ranks takes a pass, or half of the batch; against unmodified pipelines and one rank."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from clear_dist import parallelize
from clear_dist.comm.group import Group
from clear_dist.geometry import cut_in_stripes
from clear_dist.parallelized import Parallelized
from tests.families.flux2.tiny import make_tiny_klein
from tests.families.sd3.test_pipeline import skipping
from tests.families.sd3.tiny import make_tiny_pipeline as make_tiny_sd3
from tests.families.z_image.tiny import make_tiny_z_image
from tests.ranks import run_ranks
from tests.test_parallelize import relative_error
from tests.tiny import make_tiny_pipeline

HEIGHT, WIDTH, STEPS = 112, 64, 3
NEGATIVE = "fog over all of it"
"""Longer than the prompt: texts of two lengths where nothing is padded."""
EXACT: dict[str, Any] = {"window": 3, "text_attention": "exact", "cut": "columns"}
AVERAGE: dict[str, Any] = {"window": 3, "text_attention": "average"}
STALE: dict[str, Any] = {**EXACT, "schedule": "stale", "warmup_steps": 1}
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "flux": (make_tiny_pipeline, {"true_cfg_scale": 3.0}),
    "flux2": (partial(make_tiny_klein, is_distilled=False), {"guidance_scale": 3.0}),
    "sd3": (partial(make_tiny_sd3, "medium"), {"guidance_scale": 3.0}),
    "z_image": (make_tiny_z_image, {"guidance_scale": 3.0}),
}
IN_TWO_PASSES = ("flux", "flux2")
AS_OF_TWO_STRIPES = {"average": AVERAGE, "stale": STALE}


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
def stock(name: str, **changed: Any) -> Tensor:
    return draw(name, MODELS[name][0](), **changed)


@cache
def on_one_rank(name: str) -> Tensor:
    pipe = MODELS[name][0]()
    parallelize(pipe, **EXACT)
    return draw(name, pipe)


def on_halves(pipe: Any, group: Group, **options: Any) -> Parallelized:
    return parallelize(pipe, group=group, guidance_ranks=2, **options)


def everything(group: Group) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, (make, _) in MODELS.items():
        pipe, of_model = make(), found.setdefault(name, {})
        handle = on_halves(pipe, group, window="full", cut="rows")
        of_model["full"] = draw(name, pipe)
        of_model["stripes"], of_model["comm"] = handle.stripes, handle.counters.as_dict()
        of_model["unguided"] = draw(name, pipe, **dict.fromkeys(MODELS[name][1], 1.0))
        handle.undo()
        assert "forward" not in vars(pipe.transformer)
        handle = on_halves(pipe, group, **EXACT)
        of_model["windowed"] = draw(name, pipe)
        handle.undo()
        for how, options in AS_OF_TWO_STRIPES.items():  # on 2 ranks without halves, on 4 with two stripes in each
            halves = 2 if group.size == 4 else 1
            handle = parallelize(pipe, group=group, guidance_ranks=halves, **options)
            of_model[how] = draw(name, pipe)
            handle.undo()
    return found


@pytest.fixture(scope="module")
def found() -> dict[int, list[dict[str, dict[str, Any]]]]:
    return {size: run_ranks(everything, size) for size in (2, 4)}


@pytest.mark.parametrize("name", MODELS)
def test_predictions_of_both_halves_are_those_of_one_rank(name: str, found: dict[int, list[Any]]) -> None:
    unguided = stock(name, **dict.fromkeys(MODELS[name][1], 1.0))
    for size, ranks in found.items():
        for rank in (rank[name] for rank in ranks):
            assert rank["stripes"] == [(rows.start, rows.stop) for rows in cut_in_stripes(HEIGHT // 16, size // 2)]
            assert relative_error(rank["full"], stock(name)) < 1e-4, size
            assert relative_error(rank["windowed"], on_one_rank(name)) < 1e-4, size
            assert relative_error(rank["unguided"], unguided) < 1e-4, size


@pytest.mark.parametrize("name", MODELS)
def test_four_ranks_average_and_lag_as_two_stripes_do(name: str, found: dict[int, list[Any]]) -> None:
    two = found[2][0][name]
    for rank in (rank[name] for rank in found[4]):
        for how in AS_OF_TWO_STRIPES:
            assert relative_error(rank[how], two[how]) < 1e-4, how
    assert relative_error(two["average"], on_one_rank(name)) > 3e-4  # these do depend on the stripes
    assert relative_error(two["stale"], on_one_rank(name)) > 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_a_step_has_one_exchange_and_each_rank_one_pass(name: str, found: dict[int, list[Any]]) -> None:
    """Bytes by hand: of a rank's own rows, keys and values to the other stripe of its half, predictions to all."""
    channels = {"flux": 64, "flux2": 128, "sd3": 64, "z_image": 64}[name]
    rows, columns, passes = -(-HEIGHT // 16 // 2), WIDTH // 16, 2 if name in IN_TWO_PASSES else 1
    for rank in (rank[name] for rank in found[4]):
        joined, halos = rank["comm"]["join_bytes"], rank["comm"]["halo_bytes_sent"]
        assert joined == [passes * 4 * rows * columns * channels, *[4 * rows * columns * channels] * (STEPS - 1)]
        assert halos[0] == passes * halos[1] and halos[1:] == [halos[1]] * (STEPS - 1) and halos[1] > 0


def others(group: Group) -> dict[str, Any]:
    found = {}
    for how, options in {"shards": {"shard_weights": True}, "hoisted": {"hoist_modulation": True}}.items():
        pipe = make_tiny_pipeline()
        handle = on_halves(pipe, group, window="full", **options)
        found[how] = [draw("flux", pipe, num_images_per_prompt=2) for _ in range(2)][-1]
        handle.undo()
    pipe = make_tiny_sd3("medium")
    on_halves(pipe, group, window="full")
    found["skipping"] = skipping(pipe)
    pipe = MODELS["flux2"][0]()
    on_halves(pipe, group, window="full")
    with pytest.raises(ValueError, match="one has taken a single pass; nearest: guidance_ranks=1"):
        draw("flux2", pipe, callback_on_step_end=end_guidance)
    found["after"] = draw("flux2", pipe)
    odd = group.split(group.size - 1)
    if odd.size > 1:
        with pytest.raises(ValueError, match="guidance_ranks 2 needs an even number of ranks for a picture, got 3"):
            on_halves(make_tiny_pipeline(), odd)
    return found


def end_guidance(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    pipe._guidance_scale = 1.0
    return {}


def test_other_options_and_pipelines_on_halves() -> None:
    flux, sd3 = stock("flux", num_images_per_prompt=2), skipping(make_tiny_sd3("medium"))
    for rank in run_ranks(others, 4):
        assert relative_error(rank["shards"], flux) < 1e-4
        assert relative_error(rank["hoisted"], flux) < 1e-4
        assert relative_error(rank["skipping"], sd3) < 1e-4
        assert relative_error(rank["after"], stock("flux2")) < 1e-4
