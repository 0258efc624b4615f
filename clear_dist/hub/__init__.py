"""Files from the hub: fetched once per machine while the ranks keep in touch; a failure is one line."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from glob import escape
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from huggingface_hub.constants import HF_HUB_CACHE

from clear_dist.cards.card import INDEX, Cards
from clear_dist.cards.hub_name import HubFile
from clear_dist.cards.lora import PEFT_FILE, PEFT_SETTINGS
from clear_dist.hub import fetching
from clear_dist.hub.fetching import Wanted, cached, fetch
from clear_dist.launch.ends import Failure, describe
from clear_dist.options import Refusal
from clear_dist.request.controlnet import CONFIG, STEM
from clear_dist.request.request import Lora, Request
from clear_dist.request.settle import located

if TYPE_CHECKING:
    from clear_dist.comm.group import Group


def ask(request: Request, cards: Cards) -> None:
    """Ask for files that are not here, without torch, before ranks start: what is wrong is told at once.

    Raises as `locate`, on this rank.
    """
    fetching.ask([want for want in wanted(request, cards) if want is not None and cached(want) is None])


def locate(request: Request, group: "Group", cards: Cards, *, local_rank: int) -> Request:
    """The request with its model and weights as local files, fetched once per machine where they are missing.

    Raises on all ranks: a Refusal where the hub lacks or withholds a file, there is no room, or the files do not fit;
    a Failure where the hub cannot be reached, and the files are not here.
    """
    from clear_dist.comm.in_touch import in_touch  # torch, which `ask` does without

    model, checkpoint, *others = wanted(request, cards)
    wants = [want for want in (model, checkpoint, *others) if want is not None]
    if not wants:
        return request
    fetching = partial(_failure_of, wants, request.quiet) if local_rank == 0 else lambda: None
    _raise_together(group, in_touch(group, fetching))
    folder = Path(request.model) if model is None else _held(model)
    if model is not None:
        require_same_commit(group, model.repository, folder.name)
    file = request.clear_weights if checkpoint is None else str(_held(checkpoint) / checkpoint.needed)
    return located(request, folder, file, local_loras(request), cards, local_controlnet(request))


def wanted(request: Request, cards: Cards) -> tuple[Wanted | None, ...]:
    """Files of the model, of CLEAR's weights, of the ControlNet and of each LoRA; None: here, or not asked for."""
    checkpoint = wanted_file(request.clear_weights, "--clear-weights auto")
    return wanted_model(request, cards), checkpoint, wanted_controlnet(request), *map(wanted_lora, request.loras)


def wanted_model(request: Request, cards: Cards) -> Wanted | None:
    """Files of the model to fetch; None: a folder."""
    if request.from_folder:
        return None
    return Wanted(
        repository=request.model,
        revision=request.revision,
        patterns=cards.files_of(request.model, without_weights=request.files),
        needed=INDEX,
        nearest=f"--model {cards.default}",
    )


def wanted_file(name: str | None, nearest: str) -> Wanted | None:
    """One file to fetch; None: it is here, or none was asked for."""
    hub = None if name is None or os.path.exists(name) else HubFile.of(name)
    if hub is None:
        return None
    patterns = (escape(hub.file),)
    return Wanted(repository=hub.repository, revision=hub.revision, patterns=patterns, needed=hub.file, nearest=nearest)


def wanted_lora(lora: Lora) -> Wanted | None:
    want = wanted_file(lora.source, "--lora FILE")
    if want is None or PurePath(want.needed).name != PEFT_FILE:
        return want
    return replace(want, patterns=(*want.patterns, escape(str(PurePath(want.needed).with_name(PEFT_SETTINGS)))))


def wanted_controlnet(request: Request) -> Wanted | None:
    """Files of the ControlNet to fetch; None: a folder, or none."""
    source = None if request.control is None else request.control.source
    hub = None if source is None or os.path.isdir(source) else HubFile.of(source, default=CONFIG)
    if hub is None:
        return None
    patterns = (CONFIG, *(f"{STEM}*.{ending}" for ending in ("safetensors", "safetensors.index.json")))
    return Wanted(
        repository=hub.repository,
        revision=hub.revision,
        patterns=patterns,
        needed=CONFIG,
        nearest="--controlnet union-pro",
    )


def local_controlnet(request: Request) -> Path | None:
    """The folder of the request's ControlNet, once fetched; None: it has none."""
    if request.control is None:
        return None
    want = wanted_controlnet(request)
    return Path(request.control.source) if want is None else _held(want)


def local_loras(request: Request) -> Iterator[Lora]:
    """The request's LoRA as files, once fetched."""
    for lora in request.loras:
        want = wanted_lora(lora)
        yield lora if want is None else replace(lora, source=str(_held(want) / want.needed))


def require_same_commit(group: "Group", repository: str, commit: str) -> None:
    """Raises a Refusal on all ranks where commits differ: one machine may have had no answer from the hub."""
    commits = list(dict.fromkeys(group.gather_objects(commit)))
    if len(commits) > 1:
        raise Refusal(
            f"all machines must hold the same commit of {repository}, got {', '.join(commits)}; "
            f"nearest: --revision {commits[0]}"
        )


def _held(want: Wanted) -> Path:
    folder = cached(want)
    if folder is None:
        raise Failure(
            f"{want.repository} was downloaded, but is not in {HF_HUB_CACHE}; HF_HOME must be the same on all ranks "
            "of a machine"
        )
    return folder


def _failure_of(wants: Sequence[Wanted], quiet: bool) -> Exception | None:
    try:
        fetch(wants, quiet=quiet)
    except Exception as error:
        return error
    return None


def _raise_together(group: "Group", error: BaseException | None) -> None:
    """Raises on all ranks what fetching raised on any: ranks that went on would wait for the others."""
    told = error if error is None or isinstance(error, Refusal | Failure) else RuntimeError(describe(error))
    errors = [theirs for theirs in group.gather_objects(told) if theirs is not None]
    if error is not None:
        raise error
    if errors:
        raise errors[0]
