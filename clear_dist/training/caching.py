"""Captioned pictures become shards of latents and embeddings, once, before the transformer is loaded.

Each rank makes shards of its own; a shard is written whole, and those that are there are not made again.
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.comm.in_touch import in_touch
from clear_dist.drawing.given import WHITE
from clear_dist.families.transformers import adapter_of
from clear_dist.launch.ends import describe, say
from clear_dist.options import Refusal
from clear_dist.pictures import replacing
from clear_dist.pictures.decoding import decoded
from clear_dist.request.captioned import LATENTS, TEXTS, Captioned, Part
from clear_dist.training.samples import DEVIATION, MEAN

SHARD, TOGETHER = 64, 8
"""Samples of a shard; captions encoded at once."""
MOST_BROKEN = 0.01
SETTINGS = "cache.json"


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """What the contents of a cache follow from."""

    model: str
    data: str
    samples: int
    res: int
    max_sequence_length: int
    dtype: str


def shown_texts(folder: Path, prompts: Sequence[str]) -> Path:
    """File of the embeddings of the empty prompt, for guidance, and of those that sheets of samples show: `0`, `1`, ...

    Each is [1 + prompts, ...].
    """
    return folder / "prompts" / f"{sha256(json.dumps(prompts).encode()).hexdigest()[:16]}.safetensors"


def require_made_for(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Raises a Refusal for a folder that is no cache, or whose CacheSettings are not those `wanted`, by name."""
    try:
        told = _other(folder, wanted)
    except (OSError, ValueError) as error:
        why = f"{folder} must be the cache of a distillation, with its {SETTINGS} ({describe(error)})"
        raise Refusal(f"{why}; nearest: the folder cache in an --output of clear-dist distill") from error
    if told is not None:
        raise Refusal(f"{told}; nearest: a cache that clear-dist distill makes for it")


def fill(
    folder: Path,
    samples: Sequence[Captioned],
    prompts: Sequence[str],
    settings: CacheSettings,
    group: Group,
    load_encoders: Callable[[], Any],
) -> None:
    """Make what is missing, of samples and of the sheets' prompts; all ranks call this.

    Raises a Refusal for a cache of other settings, for files of CLEAR's code that cannot be used, or more than 1 % of
    pictures that cannot be read: once they can be, the same call takes them in.
    """
    if told := group.broadcast_object(_begin(folder, settings) if group.rank == 0 else None):
        raise Refusal(told)
    shards = [(folder / f"{first:06}.safetensors", first) for first in range(0, len(samples), SHARD)]
    mine = [shard for shard in shards[group.rank :: group.size] if not shard[0].exists()]
    texts = shown_texts(folder, prompts) if group.rank == 0 else None
    lacks_texts = texts is not None and not texts.exists()
    if group.agree(bool(mine) or lacks_texts):
        in_touch(group, lambda: _make(mine, texts if lacks_texts else None, samples, prompts, settings, load_encoders))
    found = {file: _broken(file) for file, _ in shards}
    broken = [name for names in found.values() for name in names]
    for name in broken if group.rank == 0 else ():
        say(f"warning: the picture {name} cannot be read, and is left out")
    group.barrier()
    if len(broken) > MOST_BROKEN * len(samples):
        for file in (file for file, names in found.items() if names):
            file.unlink(missing_ok=True)  # pictures that are mended are to be read
        raise Refusal(
            f"at most 1 % of the pictures may be broken, got {len(broken)} of {len(samples)}, {broken[0]} first; "
            "nearest: download them again"
        )


def _begin(folder: Path, settings: CacheSettings) -> str | None:
    """Why the cache is not for these settings; None: it is, or is a new one."""
    file, mine = folder / SETTINGS, asdict(settings)
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial:
            partial.write_text(json.dumps(mine, indent=2))
        return None
    told = _other(folder, mine)
    return told and f"{told}; nearest: another --output"


def _other(folder: Path, wanted: Mapping[str, Any]) -> str | None:
    """What a cache was made with instead of what is wanted; None: nothing else."""
    held = json.loads((folder / SETTINGS).read_text())
    for name, value in wanted.items():
        if held.get(name) != value:
            return f"the cache {folder} has {name} {held.get(name)}, got {value}"
    return None


def _make(
    shards: Sequence[tuple[Path, int]],
    texts: Path | None,
    samples: Sequence[Captioned],
    prompts: Sequence[str],
    settings: CacheSettings,
    load_encoders: Callable[[], Any],
) -> None:
    if not shards and texts is None:
        return
    pipe = load_encoders()
    if texts is not None:
        texts.parent.mkdir(exist_ok=True)
        rows = adapter_of(pipe).encode(["", *prompts], settings.max_sequence_length)
        _write(texts, {str(place): x.cpu().contiguous() for place, x in enumerate(rows) if x is not None}, [])
    for file, first in shards:
        tensors: dict[str, Tensor] = {}
        broken = []
        part = samples[first : first + SHARD]
        for index, (sample, caption) in enumerate(zip(part, _texts(pipe, part, settings), strict=True), first):
            latents = _latents(pipe, sample, settings)
            if latents is None:
                broken.append(sample.name)
                continue
            row = {MEAN: latents[0], DEVIATION: latents[1]} | {str(place): text for place, text in enumerate(caption)}
            tensors |= {f"{index:06}.{name}": x.cpu().contiguous() for name, x in row.items()}
        _write(file, tensors, broken)


def _texts(pipe: Any, samples: Sequence[Captioned], settings: CacheSettings) -> Iterator[list[Tensor]]:
    """Embeddings of each caption."""
    adapter = adapter_of(pipe)
    for first in range(0, len(samples), TOGETHER):
        part = samples[first : first + TOGETHER]
        prompts = [each.prompt for each in part if each.prompt is not None]
        rows = iter(zip(*adapter.encode(prompts, settings.max_sequence_length), strict=True) if prompts else ())
        for each in part:
            if each.texts is None:
                yield list(next(rows))
            else:
                yield _of_clear(each.texts, each.name + TEXTS, "caption_feature_t5", "caption_feature_clip")


def _of_clear(part: Part, name: str, *keys: str) -> list[Tensor]:
    """Tensors of a file of CLEAR's code; raises a Refusal where they are not in it."""
    try:
        held = load(part.read())
    except SafetensorError as error:
        raise Refusal(f"{name} is cut off or damaged ({error}); nearest: make it again") from error
    if missing := next((key for key in keys if key not in held), None):
        raise Refusal(f"{name} must have the tensor {missing}, got {', '.join(held)}; nearest: make it again")
    return [held[key] for key in keys]


@torch.no_grad()
def _latents(pipe: Any, sample: Captioned, settings: CacheSettings) -> tuple[Tensor, Tensor] | None:
    """Mean and deviation [C, H, W] as the transformer takes latents; None: the picture cannot be read."""
    adapter, vae = adapter_of(pipe), pipe.vae
    if sample.latents is not None:
        mean, deviation = (x[None].float() for x in _of_clear(sample.latents, sample.name + LATENTS, "mean", "std"))
        if (got := mean.shape[-1] * pipe.vae_scale_factor) != settings.res:
            raise Refusal(f"{sample.name} has latents of {got} px, got --res {settings.res}; nearest: --res {got}")
    else:
        assert sample.picture is not None, "a sample has either"
        upright = _upright(sample.picture, settings.res)
        if upright is None:
            return None
        pixels = torch.from_numpy(np.array(upright)).permute(2, 0, 1)[None].to(vae.device, vae.dtype) / 127.5 - 1
        found = vae.encode(pixels).latent_dist
        mean, deviation = found.mean.float(), found.std.float()
    normed = adapter.from_vae(mean)
    dtype = getattr(torch, settings.dtype)
    return normed[0].to(dtype), (adapter.from_vae(mean + deviation) - normed)[0].to(dtype)


def _upright(picture: Part, side: int) -> Image.Image | None:
    """Square of `side` pixels, RGB; None: it cannot be read."""
    try:
        with Image.open(io.BytesIO(picture.read())) as image:
            return decoded(image).laid_on(WHITE).resize((side, side), Image.Resampling.BICUBIC)
    except MemoryError:
        raise
    except Exception:  # Pillow raises what it likes
        return None


def _write(file: Path, tensors: Mapping[str, Tensor], broken: Sequence[str]) -> None:
    partial = file.with_suffix(".part")  # which no shard's name ends in
    try:
        save_file(dict(tensors), partial, metadata={"broken": json.dumps(broken)})
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _broken(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as shard:
            return json.loads((shard.metadata() or {}).get("broken", "[]"))
    except (OSError, SafetensorError) as error:
        raise Refusal(f"the shard {file} is cut off or damaged ({error}); delete it, and it is made again") from error
