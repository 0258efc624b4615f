"""One rank of a distillation: draw or read pictures, encode them once, then train, and show how it goes."""

import gc
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from clear_dist import hub
from clear_dist.cards.folder import card_of
from clear_dist.comm.group import Group
from clear_dist.comm.process_groups import device_of
from clear_dist.families.cards import CARDS
from clear_dist.families.transformers import family_of
from clear_dist.launch import env
from clear_dist.launch.ends import say
from clear_dist.launch.interrupts import unwinding
from clear_dist.observe import peaks
from clear_dist.observe.progress import watched
from clear_dist.request.captioned import Captioned, find_captioned
from clear_dist.request.distill import Recipe, require_grid
from clear_dist.request.outputs import claimed, require_free
from clear_dist.request.request import Request
from clear_dist.training.caching import CacheSettings, fill, shown_texts
from clear_dist.training.checkpoint import telling_full_disk
from clear_dist.training.curves import Curves
from clear_dist.training.display import Display, displayed
from clear_dist.training.generated import draw_pictures
from clear_dist.training.patterns import pattern_of
from clear_dist.training.samples import Samples
from clear_dist.training.sheets import MOST, Sheets
from clear_dist.training.student import Student
from clear_dist.training.trainer import Figures, Trainer
from clear_dist.weights import loading

CACHE, SHEETS, PICTURES = "cache", "samples", "pictures"


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A checked recipe; `request` is that of the teacher's pictures, in which its model is settled."""

    recipe: Recipe
    request: Request
    samples: tuple[Captioned, ...] = ()
    prompts: tuple[str, ...] = ()
    """Prompts for the pictures that the teacher is to draw."""
    shown: tuple[str, ...] = ()
    """Prompts of the sheets of samples; none: captions of samples."""

    @property
    def data(self) -> Path:
        return self.recipe.data or self.recipe.output / PICTURES

    @property
    def grid(self) -> tuple[int, int]:
        height, width = self.request.size
        return height // self.request.token_size, width // self.request.token_size

    @property
    def settings(self) -> CacheSettings:
        request = self.request
        return CacheSettings(
            model=request.model_name,
            data=str(self.data),
            samples=len(self.samples),
            res=request.size[0],
            max_sequence_length=request.max_sequence_length,
            dtype=request.dtype,
        )


def distill(work: Distillation) -> None:
    """Called on every rank."""
    place = env.read()
    if place.threads is not None:
        torch.set_num_threads(place.threads)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # nothing here writes into a block's output
    device = device_of(work.request.device, place.local_rank)
    peaks.keep_for_the_next_layer(device)
    group = Group.create(device, join_seconds=work.request.join_timeout)
    output = work.recipe.output
    with claimed([output], rank=group.rank) as taken:
        require_free(group.broadcast_object(taken))
        work = replace(work, request=hub.locate(work.request, group, CARDS, local_rank=place.local_rank))
        require_grid(work.recipe, work.request)
        with unwinding(), telling_full_disk(output):  # from here on files are written
            if work.recipe.self_generate is not None:
                work = _generated(work, group)
            _train(work, _encoded(work, group), group)
    group.close()


def _generated(work: Distillation, group: Group) -> Distillation:
    """With the teacher's own pictures as samples."""
    count = work.recipe.self_generate
    assert count is not None
    draw_pictures(work.data, count, work.prompts, work.request, group)
    return replace(work, samples=find_captioned(work.data)[:count])


def _encoded(work: Distillation, group: Group) -> Path:
    """Folder of the cache."""
    recipe, folder = work.recipe, Path(work.request.model)
    card, cache = card_of(folder, CARDS), recipe.output / CACHE
    with watched(rank=group.rank, say=say) as phases:
        dtype = getattr(torch, work.request.dtype)
        load = partial(
            loading.load_encoders,
            folder,
            card,
            dtype=dtype,
            device=group.device,
            phases=phases,
            files=work.request.files,
        )
        with phases.phase("text", detail="s and pictures"):
            fill(cache, work.samples, work.shown, work.settings, group, load)
    gc.collect()
    peaks.give_back(group.device)
    return cache


def _train(work: Distillation, cache: Path, group: Group) -> None:
    recipe, folder = work.recipe, Path(work.request.model)
    dtype = getattr(torch, work.request.dtype)
    with watched(rank=group.rank, say=say) as phases, phases.phase("load", detail=" the model"):
        pipe = loading.load_pipeline(
            folder, card_of(folder, CARDS), with_text_encoders=False, dtype=dtype, device=group.device,
            on_host=("vae",), phases=phases, files=work.request.files,
        )  # fmt: skip
    family = family_of(pipe.transformer)
    adapter = family.adapted(pipe)
    pattern = pattern_of(recipe.pattern, recipe.window, recipe.down_factor)
    student = Student.of(pipe.transformer, pattern, work.grid, every=recipe.attention_every, teacher=recipe.teacher)
    samples = Samples(cache, recipe.held_out, recipe.seed)
    trainer = Trainer(student, family, samples, recipe, group)
    sheets = None
    if recipe.validation_steps is not None:
        held = load_file(shown_texts(cache, work.shown))
        texts = [held[str(place)] for place in range(len(held))]
        prompts = [x[1:] for x in texts] if work.shown else samples.first(MOST, group.device).embeddings
        sheets = Sheets(pipe, adapter, student, prompts, [x[:1] for x in texts], work.request.stages[-1])
    else:
        pipe.vae = None
    _watched(trainer, sheets, recipe, group)


def _watched(trainer: Trainer, sheets: Sheets | None, recipe: Recipe, group: Group) -> None:
    done = trainer.optimisation.steps
    curves = Curves(recipe.output, done) if group.rank == 0 else None
    pictures = recipe.batch_size * recipe.gradient_accumulation_steps * group.size
    with displayed(group.rank) as progress:
        before = trainer.held_out() if done == 0 else None
        if curves is not None and before is not None:
            curves.begin(before)
        display = Display(progress, steps=recipe.steps, done=done, pictures=pictures, device=group.device)

        def told(figures: Figures) -> None:
            step = figures.step
            held_out = trainer.held_out() if recipe.is_kept(step) else None
            if curves is not None:
                curves.add(figures, held_out)
                display.show(figures)
                if recipe.is_kept(step):
                    curves.draw()
            if sheets is not None and recipe.validation_steps and step % recipe.validation_steps == 0:
                sheets.draw(recipe.output / SHEETS / f"step_{step:06}.png", group)

        trainer.run(told)
    if group.rank == 0:
        print(recipe.output / recipe.checkpoint_name, flush=True)
