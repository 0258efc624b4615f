"""Which CLEAR checkpoint goes with a request, and whether it fits the model."""

import os
from pathlib import Path

from clear_dist import demo
from clear_dist.cards.clear import (
    PICKLED,
    PUBLISHED,
    down_factor_of,
    named_down_factor,
    radius_of,
    refuse_other_radius,
    refuse_pickled,
    require_same_tensors,
)
from clear_dist.cards.folder import ModelFacts
from clear_dist.cards.headers import read_shapes
from clear_dist.cards.hub_name import HubFile
from clear_dist.families.flux.card import CLEAR_REPOSITORY, FLUX_DEV, FLUX_SCHNELL, FluxShape
from clear_dist.options import Refusal, Window, nearest_word, shortened

DEFAULT_RADIUS = 16
"""Of the paper's pictures; used where FLUX.1's own checkpoints are, and no window was asked for."""
HUB_FORM = "owner/name:file.safetensors, or owner/name@revision:file.safetensors"


def find(word: str, window: Window | None, model: ModelFacts) -> str | None:
    """The checkpoint's file, or that of the hub as `HubFile` spells it; None: the model's own weights.

    Args:
        word: `auto`, `none`, a file, a folder, or a file or repository on the hub, as the flag has it.
        window: as asked for; None: the checkpoint's.

    Raises:
        Refusal: there is no such checkpoint, it is damaged, belongs to another model, or is for another window.
    """
    if word == "none":
        return None
    found = _automatic(window, model) if word == "auto" else _given(word, window)
    if found is None:
        return None
    if word != "auto":  # what was chosen for the user is told instead
        refuse_other_radius(found, window)
    if os.path.exists(found):
        _check(Path(found), model)
    return found


def down_factor(checkpoint: str | None) -> int:
    """Of a checkpoint's down-sampled keys, 1 without; of one on the hub as far as its name tells."""
    if checkpoint is None:
        return 1
    if os.path.exists(checkpoint):
        return down_factor_of(read_shapes(Path(checkpoint)), checkpoint)
    return named_down_factor(checkpoint) or 1


def _automatic(window: Window | None, model: ModelFacts) -> str | None:
    if window == "full":
        return None
    if model.is_demo:
        return str(demo.CLEAR_WEIGHTS)
    if model.location in (FLUX_DEV, FLUX_SCHNELL):
        file = _plain(window or DEFAULT_RADIUS)
        if file not in PUBLISHED:
            radii = sorted({radius_of(name) or 0 for name in PUBLISHED})
            nearest = min(radii, key=lambda radius: abs(radius - int(window or radius)))
            raise Refusal(
                f"--window must be one of {', '.join(map(str, radii))}, which {CLEAR_REPOSITORY} has weights for, "
                f"got {window}; nearest: {nearest}, or --clear-weights FILE"
            )
        return str(HubFile(CLEAR_REPOSITORY, None, file))
    own = _checkpoints(model.folder) if model.folder is not None else []
    return str(_choose(own, window)) if own else None


def _given(word: str, window: Window | None) -> str:
    path = Path(word).expanduser()
    if os.path.exists(path):  # a Path raises for a name that is too long
        return _local(path, window)
    if ":" not in word and path.suffix in (".safetensors", *PICKLED):
        nearest = HubFile(CLEAR_REPOSITORY, None, path.name) if path.name in PUBLISHED else "auto"
        raise Refusal(f"--clear-weights: there is no {shortened(str(path))}; nearest: {nearest}")
    found = HubFile.of(word, default=_plain(DEFAULT_RADIUS if window in (None, "full") else window))
    if found is not None:
        return _on_the_hub(found)
    if ":" in word:
        raise Refusal(f"--clear-weights on the hub must be {HUB_FORM}, got {shortened(word)!r}; nearest: auto")
    raise Refusal(
        "--clear-weights must be auto, none, a safetensors file, a folder, or on the hub owner/name:file; "
        f"there is no {shortened(str(path))}; nearest: auto"
    )


def _local(path: Path, window: Window | None) -> str:
    if os.path.isfile(path):
        return str(path)
    own = _checkpoints(path)
    if not own:
        for file in sorted(path.glob("clear_local_*")):
            refuse_pickled(file)
        raise Refusal(f"--clear-weights: {path} holds no clear_local_<radius>.safetensors; nearest: none")
    return str(_choose(own, window))


def _on_the_hub(found: HubFile) -> str:
    refuse_pickled(found.file)
    if not found.file.endswith(".safetensors"):
        raise Refusal(f"--clear-weights on the hub must be {HUB_FORM}, got {shortened(str(found))!r}; nearest: auto")
    if (found.repository, found.revision) == (CLEAR_REPOSITORY, None) and found.file not in PUBLISHED:
        nearest = nearest_word(found.file, PUBLISHED)
        raise Refusal(f"{CLEAR_REPOSITORY} has {', '.join(PUBLISHED)}, got {shortened(found.file)}; nearest: {nearest}")
    return str(found)


def _plain(radius: Window) -> str:
    return f"clear_local_{radius}.safetensors"


def _checkpoints(folder: Path) -> list[Path]:
    """Those without down-sampled keys first, then the narrowest."""
    files = [file for file in folder.iterdir() if radius_of(file.name) and file.is_file()]
    return sorted(files, key=lambda file: (named_down_factor(file.name), radius_of(file.name)))


def _choose(checkpoints: list[Path], window: Window | None) -> Path:
    """The one for the window asked for; several without a window: the narrowest, which is the fastest."""
    fitting = [file for file in checkpoints if radius_of(file.name) == window]
    return (fitting or checkpoints)[0]


def _check(file: Path, model: ModelFacts) -> None:
    shapes = read_shapes(file)
    factor = down_factor_of(shapes, file)
    # Layers of FLUX.1-dev fit FLUX.1-schnell; both are known without their files.
    flux = model.flux or (FluxShape() if model.location in (FLUX_DEV, FLUX_SCHNELL) else None)
    if flux is not None:
        require_same_tensors(flux.clear_tensors(factor), shapes, file)
