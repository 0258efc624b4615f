"""Captioned pictures become shards of latents and embeddings, once, before the transformer is loaded.

Each rank makes shards of its own; a shard is written whole, and those that are there are not made again.
"""

import errno
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
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
from clear_dist.launch.ends import Failure, say
from clear_dist.options import Refusal
from clear_dist.pictures.decoding import decoded
from clear_dist.request.captioned import Captioned
from clear_dist.training.samples import DEVIATION, MEAN

SHARD, TOGETHER = 64, 8
"""Samples of a shard; captions encoded at once."""
MOST_BROKEN = 0.01
SETTINGS = "cache.json"
NEGATIVE = "negative/000000.safetensors"
"""Embeddings of the empty prompt, for samples that are drawn with guidance."""


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """What the contents of a cache follow from."""

    model: str
    data: str
    samples: int
    res: int
    max_sequence_length: int
    dtype: str


def fill(
    folder: Path, samples: Sequence[Captioned], settings: CacheSettings, group: Group, load_encoders: Callable[[], Any]
) -> None:
    """Make what is missing; all ranks call this.

    Raises a Refusal for a cache of other settings, or more than 1 % of pictures that cannot be read; a Failure where a
    shard cannot be written.
    """
    if told := group.broadcast_object(_begin(folder, settings) if group.rank == 0 else None):
        raise Refusal(told)
    shards = [(folder / f"{first:06}.safetensors", first) for first in range(0, len(samples), SHARD)]
    mine = [shard for shard in shards[group.rank :: group.size] if not shard[0].exists()]
    negative = folder / NEGATIVE if group.rank == 0 and not (folder / NEGATIVE).exists() else None
    if group.agree(bool(mine) or negative is not None):
        in_touch(group, lambda: _make(mine, negative, samples, settings, load_encoders))
    broken = [name for file, _ in shards for name in _broken(file)]
    for name in broken if group.rank == 0 else ():
        say(f"warning: the picture {name} cannot be read, and is left out")
    if len(broken) > MOST_BROKEN * len(samples):
        raise Refusal(
            f"at most 1 % of the pictures may be broken, got {len(broken)} of {len(samples)}, {broken[0]} first; "
            "nearest: download them again"
        )


def _begin(folder: Path, settings: CacheSettings) -> str | None:
    """Why the cache is not for these settings; None: it is, or is a new one."""
    file, mine = folder / SETTINGS, asdict(settings)
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(mine, indent=2))
        return None
    held = json.loads(file.read_text())
    for name, value in mine.items():
        if held.get(name) != value:
            return f"the cache {folder} has {name} {held.get(name)}, got {value}; nearest: another --output"
    return None


def _make(
    shards: Sequence[tuple[Path, int]],
    negative: Path | None,
    samples: Sequence[Captioned],
    settings: CacheSettings,
    load_encoders: Callable[[], Any],
) -> None:
    if not shards and negative is None:
        return
    pipe = load_encoders()
    if negative is not None:
        negative.parent.mkdir(exist_ok=True)
        rows = adapter_of(pipe).encode([""], settings.max_sequence_length)
        _write(negative, {str(place): x.cpu().contiguous() for place, x in enumerate(rows) if x is not None}, [])
    for file, first in shards:
        tensors: dict[str, Tensor] = {}
        broken = []
        part = samples[first : first + SHARD]
        for index, (sample, texts) in enumerate(zip(part, _texts(pipe, part, settings), strict=True), first):
            try:
                latents = _latents(pipe, sample, settings)
            except Exception as error:
                if isinstance(error, Refusal) or sample.picture is None:
                    raise
                broken.append(sample.name)  # Pillow raises what it likes
                continue
            row = {MEAN: latents[0], DEVIATION: latents[1]} | {str(place): text for place, text in enumerate(texts)}
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
            # CLEAR's names: T5's features, then CLIP's.
            held = None if each.texts is None else load(each.texts.read())
            yield list(next(rows)) if held is None else [held["caption_feature_t5"], held["caption_feature_clip"]]


@torch.no_grad()
def _latents(pipe: Any, sample: Captioned, settings: CacheSettings) -> tuple[Tensor, Tensor]:
    """Mean and deviation [C, H, W] as the transformer takes latents."""
    adapter, vae = adapter_of(pipe), pipe.vae
    if sample.latents is not None:
        held = load(sample.latents.read())
        mean, deviation = held["mean"][None].float(), held["std"][None].float()
        if (got := mean.shape[-1] * pipe.vae_scale_factor) != settings.res:
            raise Refusal(f"{sample.name} has latents of {got} px, got --res {settings.res}; nearest: --res {got}")
    else:
        assert sample.picture is not None, "a sample has either"
        with Image.open(io.BytesIO(sample.picture.read())) as image:
            upright = decoded(image).laid_on(WHITE).resize((settings.res, settings.res), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(upright)).permute(2, 0, 1)[None].to(vae.device, vae.dtype) / 127.5 - 1
        found = vae.encode(pixels).latent_dist
        mean, deviation = found.mean.float(), found.std.float()
    normed = adapter.from_vae(mean)
    dtype = getattr(torch, settings.dtype)
    return normed[0].to(dtype), (adapter.from_vae(mean + deviation) - normed)[0].to(dtype)


def _write(file: Path, tensors: Mapping[str, Tensor], broken: Sequence[str]) -> None:
    partial = file.with_suffix(".part")
    try:
        save_file(dict(tensors), partial, metadata={"broken": json.dumps(broken)})
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        why = "the disk is full" if is_full else str(error)
        raise Failure(f"{why} while {file} was written; what was made before it stays") from error


def _broken(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as shard:
            return json.loads((shard.metadata() or {}).get("broken", "[]"))
    except (OSError, SafetensorError) as error:
        raise Refusal(f"the shard {file} is cut off or damaged ({error}); delete it, and it is made again") from error
