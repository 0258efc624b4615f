"""Puts a stock diffusers pipeline on stripes."""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clear_dist.attention import choose_backend
from clear_dist.cards.clear import refuse_other_radius
from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group, close
from clear_dist.engine.agreement import (
    CurrentScheduler,
    adapters_of,
    fingerprint,
    require_equal_parts,
    require_equal_settings,
)
from clear_dist.engine.capture import as_cuda_graph
from clear_dist.engine.family import Family
from clear_dist.engine.settings import Settings
from clear_dist.engine.stock import require_stock
from clear_dist.engine.strided import fit_to_vae
from clear_dist.engine.striped import StripedModel, striped_of
from clear_dist.families.transformers import controlnets_of, family_of
from clear_dist.options import Options, Refusal, Window, check_window, nearest_word
from clear_dist.parallelized import Parallelized
from clear_dist.request.beside_controlnets import check_beside_controlnets, without_them
from clear_dist.request.devices import missing_compiler
from clear_dist.request.notes import averaging, sharing
from clear_dist.weights.blocks import quantise_and_shard, require_quantisable
from clear_dist.weights.clear import ReplacedWeights, load_clear_weights, require_radius
from clear_dist.weights.hoisted import HoistedModulation
from clear_dist.weights.offload import Offloaded, offloaded_parts
from clear_dist.weights.quantised import why_not_float8


def parallelize(
    pipe: Any,
    options: Options | None = None,
    *,
    clear_weights: str | Path | None = None,
    controlnet_window: Window | None = None,
    group: Group | None = None,
    **chosen: Any,
) -> Parallelized:
    """Cut the transformer of `pipe`, and its ControlNets, in stripes, one per rank; all else stays diffusers'.

    Called on every rank. The pipeline is then used as ever, with equal arguments and equally seeded generators.

    Args:
        pipe: a diffusers pipeline, on the device where it is to run.
        options, chosen: a `clear_dist.Options`, its fields by name (window=16, text_attention="exact"), or both.
        clear_weights: a CLEAR checkpoint; without one a window draws noise, unless `pipe` was trained with it.
        controlnet_window: window of ControlNets, which CLEAR has not distilled; by default full, as in the paper.
        group: ranks that share an image; by default all of torch.distributed's, or the launcher's, or this one alone.
            With guidance_ranks=2 each half of them takes a pass of guidance.

    Raises:
        ValueError: an argument is wrong or differs between ranks, or the pipeline's transformer cannot be cut.
        TypeError: there is no such option.
    """
    family, nets = family_of(getattr(pipe, "transformer", None)), controlnets_of(pipe)
    require_stock(family.transformer, *(net.transformer for net in nets))
    with as_arguments():
        options = settled(as_record(options, chosen), clear_weights)
        check_window(controlnet_window, "--controlnet-window")
        if nets:
            check_beside_controlnets(options)
    device = group.device if group is not None else pipe._execution_device  # also where its parts are on the host
    dtype = family.transformer.dtype
    require_machine(options, device, dtype)
    choose = partial(choose_backend, options.attention_backend, device=device, dtype=dtype, head_dim=family.head_dim)
    choose()  # raises where there is no such backend for any image
    require_quantisable(family, *nets, options=options)
    with on_refusal() as undo:
        offloaded = Offloaded(pipe, device, offloaded_parts(pipe.components)) if options.offload else None
        undo += [] if offloaded is None else [offloaded.remove]
        used, half, own = meet(device, group, options, undo)
        capture = as_cuda_graph if options.cuda_graphs == "auto" and device.type == "cuda" else None
        settings = Settings(options=options, choose_backend=choose, capture=capture)
        models, replaced = put_on_stripes(pipe, family, nets, used, settings, clear_weights, controlnet_window, half)
    if group is None and used.rank == 0:  # the command line, which has a group, has said it
        for line in (*averaging(options, half.size), *sharing(used.transport)):
            warnings.warn(with_arguments(line), stacklevel=2)
    return Parallelized(models[0], models[1:], own, replaced, offloaded)


def meet(
    device: torch.device, given: Group | None, options: Options, undo: list[Callable[[], None]]
) -> tuple[Group, Group, list[Group]]:
    """The group, its part that takes a pass of guidance with this rank, and those of the two that are made here."""
    with as_arguments():
        group = given or Group.create(device, share_gpus=options.share_gpus)
        own = [group] if given is None else []
        undo.append(partial(close, own, group))
        require_equal_settings(group, guidance_ranks=options.guidance_ranks)
        half = group.halves() if options.halves(group.size) else group
    own += [half] if half is not group else []
    return group, half, own


def as_record(options: Options | None, chosen: dict[str, Any]) -> Options:
    """Options with those replaced that were given by name; raises TypeError where there is no such option."""
    known = [each.name for each in fields(Options)]
    for name in chosen.keys() - set(known):
        nearest = nearest_word(name, known)
        raise TypeError(f"parallelize() got an unexpected keyword argument {name!r}; nearest: {nearest}")
    return replace(options or Options(), **chosen)


@contextmanager
def as_arguments() -> Iterator[None]:
    """Context in which a Refusal names arguments rather than flags: `text_attention` for `--text-attention`."""
    try:
        yield
    except Refusal as error:
        raise Refusal(with_arguments(str(error))) from None


def with_arguments(text: str) -> str:
    return re.sub(r"--([a-z0-9][a-z0-9-]*)", lambda flag: flag[1].replace("-", "_"), text)


def settled(options: Options, clear_weights: str | Path | None) -> Options:
    """Options with everything chosen; without a window, the checkpoint's or full attention."""
    if options.window is None and clear_weights is not None:
        return options.settled(require_radius(clear_weights))
    if clear_weights is not None:
        refuse_other_radius(clear_weights, options.window)
    return options.settled("full")


def require_machine(options: Options, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError where this machine lacks something that the options need."""
    if options.float8 and (needed := why_not_float8(device, dtype)):
        raise ValueError(f"float8 needs {needed}; nearest: float8=False")
    if options.compile and (missing := missing_compiler(device.type)):
        raise ValueError(f"compile needs {missing}, got none; nearest: compile=False")
    choose_backend(options.attention_backend, device=device, dtype=dtype)


@contextmanager
def on_refusal() -> Iterator[list[Callable[[], None]]]:
    """Context that calls the functions of its list, last first, where it ends with a ValueError."""
    undo: list[Callable[[], None]] = []
    try:
        yield undo
    except ValueError:  # and nothing else: after a lost peer no group can be closed
        for step in reversed(undo):
            step()
        raise


def put_on_stripes(
    pipe: Any,
    family: Family,
    nets: Sequence[Family],
    group: Group,
    settings: Settings,
    clear_weights: str | Path | None,
    net_window: Window | None,
    stripes: Group,
) -> tuple[list[StripedModel], ReplacedWeights | None]:
    """Put the transformer and its ControlNets on stripes, or none where one refuses; with CLEAR's weights.

    A VAE that diffusers has loaded without its stride gets it, for good. `stripes` as in `Guidance`.
    """
    transformer, options = family.transformer, settings.options
    assert options.window is not None, "settled"
    windows, models = [net_window or "full"] * len(nets), [transformer, *(net.transformer for net in nets)]
    replaced = None if clear_weights is None else load_clear_weights(transformer, clear_weights, group.device)
    on_all = asdict(options) | {"attention_backend": settings.choose_backend().name}
    del on_all["offload"]  # concerns this rank's parts alone
    require_equal_settings(
        group,
        **on_all,
        dtype=transformer.dtype,
        clear_weights=replaced and replaced.checksums(transformer),
        adapters=[adapters_of(model) for model in models],
        weights=[fingerprint(model) for model in models],
        **{"ControlNets' windows": windows},
    )
    encoders = {name: part for name, part in pipe.components.items() if name.startswith("text_encoder")}
    require_equal_parts(group, encoders)
    if replaced is not None and options.radius is not None:
        settings = replace(settings, pooling=replaced.pooling)
    with on_refusal() as undo:
        striped = []
        for net, window in ((family, None), *zip(nets, windows, strict=True)):
            own = settings if window is None else of_controlnet(settings, net, window)
            striped.append(put_model_on_stripes(net, CurrentScheduler(pipe), group, own, stripes))
            undo.append(striped[-1].remove)
    fit_to_vae(pipe)
    return striped, replaced


def put_model_on_stripes(
    family: Family, scheduler: Any, group: Group, settings: Settings, stripes: Group | None = None
) -> StripedModel:
    """Put one transformer or ControlNet on stripes, its weights changed as the options say."""
    counters, options = Counters(), settings.options
    with on_refusal() as undo:
        modulation = HoistedModulation(family, group.device) if options.hoist_modulation else None
        undo += [] if modulation is None else [modulation.undo]
        elsewhere = modulation.weights if modulation is not None else set()
        shards = quantise_and_shard(family, group, counters, options, elsewhere=elsewhere)
        changed: dict[str, Any] = {"modulation": modulation, "shards": shards}
        return StripedModel(family, scheduler, group, settings, counters=counters, stripes=stripes, **changed)


def of_controlnet(settings: Settings, net: Family, window: Window) -> Settings:
    """Settings of a ControlNet, `exact` where it sees all; raises ValueError where its backend cannot compute it.

    Down-sampled keys and shares of the text are for the transformer alone: CLEAR has keys for no other, and a
    ControlNet may put a token of its own before the text.
    """
    choose = partial(settings.choose_backend, dtype=net.transformer.dtype, head_dim=net.head_dim)
    choose()
    text_attention = "exact" if window == "full" else settings.options.text_attention
    own: dict[str, Any] = {"text_attention": text_attention, "text_tokens": "replicated"}
    options = replace(without_them(settings.options), window=window, **own)
    return replace(settings, options=options, choose_backend=choose, pooling=None, transformer=settings)


def interrupt(pipe: Any, when: bool = True) -> bool:
    """Stop a generation after this step, on all ranks, if `when` is true on any of them; returns the decision.

    Called on every rank at the same step, from `callback_on_step_end`: ranks that decided alone would wait for each
    other for ever.
    """
    striped = striped_of(pipe.transformer)
    stop = striped.group.agree(when) if striped is not None else when
    if stop:  # the pipeline's loop asks for it before each step
        pipe._interrupt = True
    return stop
