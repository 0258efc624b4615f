"""Where the checkpoints of a picture are, and what it is that they are of: another request's are refused."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from clear_dist.cards.sampled import digest_of
from clear_dist.options import Refusal, shortened
from clear_dist.request.request import Request

REQUEST = "request.json"
"""File that tells, beside the checkpoints, what they are of."""
LONGEST_STEM = 200
"""Characters of an output's name in that of its folder: names have an end."""
FREE = (
    "checkpoint_every", "clear_weights", "control", "cuda_graphs", "data_ranks", "files", "join_timeout",
    "keep_going", "keep_text_encoder", "latents_out", "lines", "loras", "metadata", "model", "native_size",
    "offload", "output", "pictures", "preview_every", "profile", "prompts", "quiet", "report", "resume",
    "revision", "save_stages", "seed", "shard_weights", "share_gpus", "world_size",
)  # fmt: skip
"""Settings that leave the picture as it is, or that are compared by their contents."""


def folder_of(output: Path) -> Path:
    """Folder of a picture's checkpoints, beside the file that is replaced."""
    file = output.resolve()
    return file.with_name(f"{file.name[:LONGEST_STEM]}.resume")


def weights_of(request: Request, loras: Iterator[Path], controlnet: Path | None) -> dict[str, str]:
    """Digests of all weights; the request is located, so are the others."""
    found: dict[str, list[Path]] = {"model": _of_folder(Path(request.model)), "loras": list(loras)}
    found["files"] = sorted({each.file for each in request.files.values()})
    if request.clear_weights is not None:
        found["clear_weights"] = [Path(request.clear_weights)]
    if controlnet is not None:
        found["controlnet"] = sorted(controlnet.glob("*.safetensors"))
    return {name: digest_of(files) for name, files in found.items() if files}


def described(request: Request, index: int, images: range, weights: Mapping[str, str]) -> dict[str, Any]:
    """What prompt `index` is drawn from, its seed aside, in JSON's types and words that a person knows."""
    alone = request.alone(index)
    settings = {name: value for name, value in asdict(alone).items() if name not in FREE}
    settings |= {"prompt": request.prompts[index], "images": [images.start, images.stop]}
    settings |= {f"weights_of_{name}": digest for name, digest in weights.items()}
    settings["lora"] = [(lora.weight, lora.stages) for lora in request.loras]
    if request.text_attention == "average" or request.cache is not None:
        settings["ranks"] = request.ranks  # on which the picture depends, or what caches hold
    if (control := request.control) is not None:
        settings["control"] = [control.scale, control.mode, control.window, _content(control.image)]
    if (picture := alone.picture) is not None:
        settings["picture"] = [_content(picture.file), _content(picture.mask), picture.box, picture.background]
    return dict(_flat(json.loads(json.dumps(settings, default=str))))


def require_same(folder: Path, own: Mapping[str, Any], asked: int | None) -> int | None:
    """The seed of the checkpoints in a folder; None without any. Raises a Refusal where they are of something else.

    `own` is `described`, `asked` the seed that was asked for, if any.
    """
    file = folder / REQUEST
    try:
        found = json.loads(file.read_text())
        seed, theirs = int(found["seed"]), {"seed": found["seed"], **found["settings"]}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refusal(f"{file} is damaged ({type(error).__name__}); {_afresh(folder)}") from error
    own = {"seed": seed if asked is None else asked, **own}
    for name in [*own, *theirs]:
        if own.get(name) != theirs.get(name):
            there, here = (shortened(str(settings.get(name))) for settings in (theirs, own))
            raise Refusal(f"{folder} has checkpoints of another picture: {name} {there}, got {here}; {_afresh(folder)}")
    return seed


def note(seed: int, settings: Mapping[str, Any]) -> str:
    """What is written into `REQUEST`."""
    return json.dumps({"seed": seed, "settings": settings}, indent=1) + "\n"


def digest_of_note(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16]


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield before + name, value


def _afresh(folder: Path) -> str:
    return f"nearest: --no-resume, or delete {folder.name}"


def _of_folder(folder: Path) -> list[Path]:
    """Configurations and weights of a model's parts; files beside their folders are others' (`files`, CLEAR's)."""
    return sorted(file for file in folder.glob("*/*") if file.suffix in (".safetensors", ".json"))


def _content(file: Path | None) -> str | None:
    return None if file is None else sha256(file.read_bytes()).hexdigest()[:16]
