"""Which CLEAR checkpoint goes with a request, and whether it fits the model."""

import os
import re
from pathlib import Path

from clear_dist import demo
from clear_dist.clear_checkpoint import radius_of, refuse_down_sampled, require_same_tensors
from clear_dist.config import CLEAR_REPOSITORY, FLUX_DEV, FLUX_SCHNELL, Refusal, Window, shortened
from clear_dist.preflight.headers import read_shapes
from clear_dist.preflight.model import ModelFacts

DEFAULT_RADIUS = 16
"""Of the paper's pictures; used where FLUX.1's own checkpoints are, and no window was asked for."""


def find(word: str, window: Window | None, model: ModelFacts) -> str | None:
    """The checkpoint's file, or `owner/name:file` on the hub; None: the model's own weights.

    Args:
        word: `auto`, `none`, a file, a folder or a hub file, as the flag has it.
        window: as asked for; None: the checkpoint's.

    Raises:
        Refusal: there is no such checkpoint, it is damaged, or it belongs to another model.
    """
    if word == "none":
        return None
    if word == "auto":
        found = None if window == "full" else _automatic(window, model)
    elif os.path.exists(Path(word).expanduser()) or ":" not in word:  # a Path raises for a name that is too long
        found = _local(Path(word).expanduser(), window)
    else:
        found = word if _is_hub_file(word) else None
        if found is None:
            raise Refusal(f"--clear-weights on the hub must be owner/name:file, got {shortened(word)!r}; nearest: auto")
    if found is not None:
        refuse_down_sampled(found)
    if found is not None and os.path.exists(found):
        _check(Path(found), model)
    return found


def _automatic(window: Window | None, model: ModelFacts) -> str | None:
    if model.is_demo:
        return str(demo.CLEAR_WEIGHTS)
    if model.location in (FLUX_DEV, FLUX_SCHNELL):
        return f"{CLEAR_REPOSITORY}:clear_local_{window or DEFAULT_RADIUS}.safetensors"
    own = _checkpoints(model.folder) if model.folder is not None else []
    return str(_choose(own, window)) if own else None


def _local(path: Path, window: Window | None) -> str:
    if os.path.isfile(path):
        return str(path)
    if not os.path.exists(path):
        raise Refusal(
            f"--clear-weights must be auto, none, a safetensors file, a folder, or a hub file owner/name:file; "
            f"there is no {shortened(str(path))}; nearest: auto"
        )
    own = _checkpoints(path)
    if not own:
        raise Refusal(f"--clear-weights: {path} holds no clear_local_<radius>.safetensors; nearest: none")
    return str(_choose(own, window))


def _checkpoints(folder: Path) -> list[Path]:
    files = [file for file in folder.iterdir() if radius_of(file.name) and file.is_file()]
    return sorted(files, key=lambda file: radius_of(file.name) or 0)


def _choose(checkpoints: list[Path], window: Window | None) -> Path:
    """The one for the window asked for; several without a window: the narrowest, which is the fastest."""
    fitting = [file for file in checkpoints if radius_of(file.name) == window]
    return (fitting or checkpoints)[0]


def _is_hub_file(word: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+:[\w./-]+\.safetensors", word) is not None


def _check(file: Path, model: ModelFacts) -> None:
    shapes = read_shapes(file)
    refuse_down_sampled(file, shapes)
    if model.flux is not None:
        require_same_tensors(model.flux.clear_tensors(), shapes, file)
