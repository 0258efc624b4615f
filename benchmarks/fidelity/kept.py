"""What a folder of results was made with: the same command goes on from there, other settings are refused."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clear_dist.cards.clear import radius_of
from clear_dist.demo.data import HELD_OUT_SEED
from clear_dist.demo.grammar import random_caption
from clear_dist.pictures import replacing

SETTINGS = "settings.json"
FULL = "full"
"""Name of the model's own weights, with full attention."""


def held_out_prompts(count: int) -> list[str]:
    """Captions of the first scenes that the embedded model's training did not see."""
    return [random_caption(np.random.default_rng(HELD_OUT_SEED + scene)) for scene in range(count)]


def keep_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make `folder` with its `settings.json`, or add to it what is new.

    Raises ValueError where a setting has another value there.
    """
    file = folder / SETTINGS
    kept = json.loads(file.read_text()) if file.exists() else {}
    for name, value in settings.items():
        if kept.get(name, value) != value:
            rule = f"{folder} holds results with {name} {shown(kept[name])}, got {shown(value)}"
            raise ValueError(f"{rule}; nearest: {shown(kept[name])}, or another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        partial.write_text(json.dumps({**kept, **settings}, indent=2) + "\n")


def shown(value: Any) -> str:
    return str(value)[:40]


def digest(path: Path) -> str:
    """Digest of a file, or of all safetensors files in a folder."""
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            found.update(hashlib.file_digest(stream, "sha256").digest())
    return found.hexdigest()[:16]


def weights_by_name(files: Sequence[Path]) -> dict[str, Path]:
    """CLEAR files by the names that figures have for them.

    Raises ValueError for one that is not there, has no radius in its name, or shares it with another.
    """
    for file in files:
        if not file.is_file() or radius_of(file) is None:
            raise ValueError(f"CLEAR weights must be files named clear_local_<radius>.safetensors, got {file}")
    named = {file.stem: file for file in files}
    if len(named) < len(files):
        raise ValueError(f"CLEAR weights must have different names, got {', '.join(map(str, files))}")
    return named
