"""Which CLEAR checkpoint goes with a request, and whether it fits the model."""

import re
from pathlib import Path

from clear_dist import demo
from clear_dist.config import CLEAR_REPOSITORY, FLUX_DEV, FLUX_SCHNELL, Refusal, Window
from clear_dist.preflight.headers import compare, read_shapes
from clear_dist.preflight.model import ModelFacts

DEFAULT_RADIUS = 16
"""Of the paper's pictures; used where FLUX.1's own checkpoints are, and no window was asked for."""
CHECKPOINT = re.compile(r"clear_local_(\d+)\.safetensors")
DOWN_SAMPLED = "spatial_weight"


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
    elif Path(word).expanduser().exists() or ":" not in word:
        found = _local(Path(word).expanduser(), window)
    else:
        found = word if _is_hub_file(word) else None
        if found is None:
            raise Refusal(f"--clear-weights on the hub must be owner/name:file, got {word!r}; nearest: auto")
    if found is not None and Path(found).exists():
        _check(Path(found), model)
    return found


def radius_of(checkpoint: str) -> int | None:
    """The radius in tokens that a checkpoint was distilled for, from its name."""
    match = CHECKPOINT.fullmatch(re.split(r"[/:]", checkpoint)[-1])
    return int(match[1]) if match else None


def _automatic(window: Window | None, model: ModelFacts) -> str | None:
    if model.is_demo:
        return str(demo.CLEAR_WEIGHTS)
    if model.location in (FLUX_DEV, FLUX_SCHNELL):
        return f"{CLEAR_REPOSITORY}:clear_local_{window or DEFAULT_RADIUS}.safetensors"
    own = _checkpoints(model.folder) if model.folder is not None else []
    return str(_choose(own, window)) if own else None


def _local(path: Path, window: Window | None) -> str:
    if path.is_file():
        return str(path)
    if not path.exists():
        raise Refusal(
            f"--clear-weights must be auto, none, a safetensors file, a folder, or a hub file owner/name:file; "
            f"there is no {path}; nearest: auto"
        )
    own = _checkpoints(path)
    if not own:
        raise Refusal(f"--clear-weights: {path} holds no clear_local_<radius>.safetensors; nearest: none")
    return str(_choose(own, window))


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(
        (file for file in folder.iterdir() if radius_of(file.name)), key=lambda file: radius_of(file.name) or 0
    )


def _choose(checkpoints: list[Path], window: Window | None) -> Path:
    """The one for the window asked for; several without a window: the narrowest, which is the fastest."""
    fitting = [file for file in checkpoints if radius_of(file.name) == window]
    return (fitting or checkpoints)[0]


def _is_hub_file(word: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+:[\w./-]+\.safetensors", word) is not None


def _check(file: Path, model: ModelFacts) -> None:
    shapes = read_shapes(file)
    if any(DOWN_SAMPLED in name for name in shapes):
        raise Refusal(
            f"checkpoints with down-sampled keys are not supported, got {file}; nearest: clear_local_8.safetensors"
        )
    if model.flux is not None:
        compare(model.flux.clear_tensors(), shapes, file)
