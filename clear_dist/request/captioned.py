"""Captioned pictures to train on: in a folder, in webdataset's tars, or encoded already by CLEAR's own code.

In a folder a picture `NAME.jpg` lies beside `NAME.json` with the key "prompt" or `NAME.txt`, and maybe beside
`NAME_latent_code.safetensors` and `NAME_prompt_embed.safetensors`; a tar has the same names in it.
"""

import json
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from clear_dist.options import Refusal, shortened

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
LATENTS, TEXTS = "_latent_code.safetensors", "_prompt_embed.safetensors"
"""Ends of the names that CLEAR's `cache_latent_codes.py` and `cache_prompt_embeds.py` give."""
NEAREST = 'nearest: NAME.txt, or NAME.json with {"prompt": ...}, beside each'


@dataclass(frozen=True, kw_only=True)
class Part:
    """A file, or `size` bytes of a tar from `start` on."""

    file: Path
    start: int = 0
    size: int = -1

    def read(self) -> bytes:
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            return stream.read(self.size)


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """A picture, or its latents, with a caption, or its embeddings."""

    name: str
    picture: Part | None
    prompt: str | None
    latents: Part | None = None
    texts: Part | None = None


def find_captioned(where: Path) -> tuple[Captioned, ...]:
    """All samples in a folder or tar, by name; a Refusal where there are none, or one has no caption."""
    try:
        if where.is_dir():
            files = sorted(file for file in where.rglob("*") if file.is_file() and not file.name.startswith("."))
            tars = [file for file in files if file.suffix == ".tar"]
            parts = {str(file.relative_to(where)): Part(file=file) for file in files if file.suffix != ".tar"}
        else:
            tars, parts = [where], {}
        for tar in tars:
            parts |= _members(tar)
    except OSError as error:
        raise Refusal(f"--data must be a folder or a tar, got {shortened(str(where))} ({error.strerror})") from error
    samples = tuple(_samples(parts))
    if not samples:
        raise Refusal(f"--data must hold pictures ({', '.join(PICTURES)}), got {where} without any; {NEAREST}")
    without = [each.name for each in samples if each.prompt is None and each.texts is None]
    if without:
        raise Refusal(f"each picture must have a caption, got {len(without)} without, {without[0]} first; {NEAREST}")
    return samples


def _members(tar: Path) -> dict[str, Part]:
    try:
        with tarfile.open(tar, "r:") as archive:
            members, end = [member for member in archive if member.isfile()], archive.offset
    except tarfile.TarError as error:
        raise Refusal(
            f"the tar {tar} is cut off, damaged or compressed ({error}); nearest: download it again"
        ) from error
    if end >= tar.stat().st_size:  # a whole one has zeros after the last file
        raise Refusal(f"the tar {tar} is cut off after {len(members)} files; nearest: download it again")
    return {f"{tar.name}/{each.name}": Part(file=tar, start=each.offset_data, size=each.size) for each in members}


def _samples(parts: dict[str, Part]) -> Iterable[Captioned]:
    names: dict[str, dict[str, Part]] = {}
    for name, part in parts.items():
        kind = next((end for end in (LATENTS, TEXTS) if name.endswith(end)), PurePath(name).suffix)
        names.setdefault(name.removesuffix(kind), {})[kind.lower()] = part
    for name, kinds in sorted(names.items()):
        picture = next((kinds[end] for end in PICTURES if end in kinds), None)
        if picture is not None or LATENTS in kinds:
            texts = kinds.get(TEXTS)
            prompt = None if texts is not None else _prompt(name, kinds)
            yield Captioned(name=name, picture=picture, prompt=prompt, latents=kinds.get(LATENTS), texts=texts)


def _prompt(name: str, kinds: dict[str, Part]) -> str | None:
    readers: dict[str, Callable[[str], Any]] = {".json": lambda text: json.loads(text)["prompt"], ".txt": str.strip}
    for end, read in readers.items():
        if end in kinds:
            try:
                return str(read(kinds[end].read().decode()))
            except (ValueError, KeyError, TypeError) as error:
                raise Refusal(f"{name}{end} must hold a caption, and does not ({error}); {NEAREST}") from error
    return None
