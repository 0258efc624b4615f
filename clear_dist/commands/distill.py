"""`clear-dist distill`: a recipe checked and settled, then ranks that train."""

from functools import partial
from importlib import import_module
from typing import Any

from clear_dist.families.cards import CARDS
from clear_dist.launch import ends, env, ranks
from clear_dist.launch.env import Place
from clear_dist.options import Refusal
from clear_dist.request import devices
from clear_dist.request.captioned import find_captioned
from clear_dist.request.distill import Recipe, newest_checkpoint, read_recipe, require_grid, require_left, require_same
from clear_dist.request.flags import GenerateFlags
from clear_dist.request.lines import lines_of
from clear_dist.request.request import Request
from clear_dist.request.settle import choose

PRELOAD = ("torch", "clear_dist.training.run")
VALIDATION = "--validation-prompts"


def distill(flags: Any) -> int:
    """Make a model linear: train its attention to do with a window what it does without (CLEAR, Sec. 3.3).

    Goes on from the newest checkpoint in --output, if there is one. The result is a file for --clear-weights.
    """
    place = env.read_for(flags.nproc)
    recipe = read_recipe(flags)
    elsewhere = flags.gpu != "auto" or recipe.model not in ("auto", "demo")
    request = settled(recipe, place, for_gpu=flags.plan and elsewhere)
    if flags.plan:
        ranks.hush()
        return import_module("clear_dist.training.budget").show(recipe, request, flags.gpu)
    recipe.require_packages()
    samples = () if recipe.data is None else find_captioned(recipe.data)
    require_left(recipe.held_out, recipe.self_generate or len(samples))
    prompts = () if recipe.prompts is None else lines_of(recipe.prompts, place)
    shown = () if recipe.validation_prompts is None else lines_of(recipe.validation_prompts, place, VALIDATION)
    if place.rank == 0 and (newest := newest_checkpoint(recipe.output)) is not None:
        ends.say(f"going on from {newest}")
    if place.local_rank == 0:
        ranks.hush()
        import_module("clear_dist.hub").ask(request, CARDS)
    return ranks.run(
        partial(_distill, recipe, request, samples, prompts, shown),
        nproc=request.world_size,
        on_cuda=request.device == "cuda",
        traceback=flags.traceback,
        preload=PRELOAD,
    )


def settled(recipe: Recipe, place: Place, *, for_gpu: bool = False) -> Request:
    """Model, size, device (`for_gpu`: as if there were one) and ranks; a Refusal for what is wrong before loading."""
    if recipe.output.exists() and not recipe.output.is_dir():
        raise Refusal(f"--output must be a folder, got the file {recipe.output}; nearest: {recipe.output}-distilled")
    if (newest := newest_checkpoint(recipe.output)) is not None:
        require_same(recipe, newest)
    gpus = devices.gpus_for(recipe.device)
    device = "cuda" if gpus or for_gpu else "cpu"
    if recipe.teacher == "float8" and device == "cpu":
        raise Refusal("--teacher float8 needs a CUDA GPU of compute capability 8.9, got cpu; nearest: int8")
    flags = GenerateFlags(
        model=recipe.model,
        revision=recipe.revision,
        res=recipe.res,
        max_sequence_length=recipe.max_sequence_length,
        window="full",
        clear_weights="none",
        cascade="off",
        dtype=recipe.dtype,
        device=recipe.device,
        nproc=recipe.nproc,
    )
    used = gpus[: place.local_world_size if place.launcher else recipe.nproc]
    request, facts, _ = choose(flags, place, CARDS, device=device, gpus=used)
    if facts.has_yarn:
        raise Refusal(f"distill is for models without YaRN, got {facts.name}; nearest: --model {CARDS.default}")
    require_grid(recipe, request)
    return request


def _distill(
    recipe: Recipe, request: Request, samples: tuple[Any, ...], prompts: tuple[str, ...], shown: tuple[str, ...]
) -> None:
    run = import_module("clear_dist.training.run")  # torch: not for --help, nor for a refusal
    run.distill(run.Distillation(recipe=recipe, request=request, samples=samples, prompts=prompts, shown=shown))
