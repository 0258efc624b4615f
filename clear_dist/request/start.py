"""The start of a request, noise or a picture: prompts, size, and how it is denoised."""

import stat
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from clear_dist import demo
from clear_dist.cards.folder import ModelFacts
from clear_dist.launch.env import Place
from clear_dist.options import Refusal, shortened, spelled
from clear_dist.pictures import numbered
from clear_dist.refining import REFINEMENTS
from clear_dist.request.flags import UPSCALED, GenerateFlags, PictureFlags, UpscaleFlags
from clear_dist.request.pictures import find_files, find_image, find_picture
from clear_dist.request.request import Picture
from clear_dist.stages import ImageToImage, Sampling, Upscaling

DEFAULT_PROMPT = "a lighthouse on a cliff at dusk, its light over a calm sea"
GUIDANCE = ("guidance_scale", "true_cfg_scale")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Fields of the request that `generate` and `upscale` choose each in their own way; sizes in pixels."""

    prompts: tuple[str, ...]
    height: int | None
    """None: a hub model's native size."""
    width: int | None
    sampling: Sampling
    output: Path
    num_images: int = 1
    cascade: bool = True
    pictures: tuple[Picture, ...] = ()


def find_start(flags: PictureFlags, facts: ModelFacts, place: Place, *, unit: int) -> Start:
    """The start asked for; raises a Refusal for unreadable prompts or picture, or a side not in whole `unit` pixels."""
    for name in ("res", "height", "width", "base_res"):
        check_units(name, getattr(flags, name), unit, facts.token_size)
    if isinstance(flags, UpscaleFlags):
        return _from_pictures(flags, facts, place, unit)
    assert isinstance(flags, GenerateFlags), flags
    prompts, picture = _prompts(flags, facts, place), find_image(flags, facts, unit=unit)
    height, width = flags.height or flags.res, flags.width or flags.res
    if picture is not None:
        height, width = picture.target
    sampling = replace(facts.sampling, **_given(flags, "steps", *GUIDANCE))
    is_start = picture is not None and (facts.card is None or facts.card.starts_from_pictures)
    return Start(
        prompts=prompts,
        height=height or facts.native_size,
        width=width or facts.native_size,
        sampling=ImageToImage.of(sampling, flags.strength) if is_start else sampling,
        output=flags.output,
        num_images=flags.num_images,
        cascade=flags.cascade == "auto",
        pictures=() if picture is None else (picture,) * len(prompts),
    )


def upscaling(flags: PictureFlags, sampling: Sampling, facts: ModelFacts) -> Upscaling:
    """Settings of the upper stages, by default with the steps of diffusers' img2img.

    Where the first stage starts from a picture, `--strength` is that stage's.
    """
    own, steps = _given(flags, "ntk_factor", "ntk", *GUIDANCE), sampling.steps
    model, word = facts.upscaling, flags.refine or facts.upscaling.refinement
    if isinstance(sampling, ImageToImage):
        steps = sampling.schedule
    elif flags.strength is not None:
        if "strength" in REFINEMENTS[word].usual(steps, model.strength):
            raise Refusal(f"--strength is for --refine sdedit, got {flags.strength:g} for {word}; leave one out")
        model = replace(model, strength=flags.strength)
    if flags.upscale_steps is not None:
        own |= {"steps": flags.upscale_steps, "later_steps": None}
    try:
        return replace(model.above(steps, word), **own)
    except ValueError as error:
        raise Refusal(f"--upscale-steps: {error}") from error


def _given(flags: PictureFlags, *names: str) -> dict[str, Any]:
    values = {name: getattr(flags, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _from_pictures(flags: UpscaleFlags, facts: ModelFacts, place: Place, unit: int) -> Start:
    files = list(find_files(flags.files))
    count = len(files)
    lines = None if flags.prompts is None else lines_of(flags.prompts, place)
    if lines is not None and len(lines) != count:
        raise Refusal(f"--prompts must hold a prompt for each of {count} pictures, got {len(lines)}; nearest: {count}")
    pictures, prompts, outputs = [], [], []
    for index, file in enumerate(files):
        output = Path(f"{file.stem}{UPSCALED}.png") if flags.output is None else numbered(flags.output, index, count)
        picture, own = find_picture(file, output, flags, facts, unit=unit)
        pictures.append(picture)
        outputs.append(output)
        given = flags.prompt if lines is None else lines[index]
        prompts.append((own or "") if given is None else given)
    height, width = max((picture.target for picture in pictures), key=prod)
    return Start(
        prompts=tuple(prompts),
        height=height,
        width=width,
        sampling=facts.sampling,
        output=flags.output or outputs[0],
        pictures=tuple(pictures),
    )


def check_units(name: str, size: int | None, unit: int, token: int) -> None:
    """Raises a Refusal where a side in pixels is not in whole `unit` pixels."""
    if size is not None and size % unit:
        below = size // unit * unit
        nearest = " or ".join(str(near) for near in (below, below + unit) if near)
        tokens = "one token" if unit == token else f"{unit // token} tokens, which CLEAR's down-sampled keys stand for"
        shown = f"{spelled(name)} must be a multiple of {unit} pixels ({tokens})"
        raise Refusal(f"{shown}, got {size}; nearest: {nearest}")


def _prompts(flags: GenerateFlags, facts: ModelFacts, place: Place) -> tuple[str, ...]:
    if flags.prompts is not None:
        return lines_of(flags.prompts, place)
    default = demo.DEFAULT_PROMPT if facts.is_demo else DEFAULT_PROMPT
    return (default if flags.prompt is None else flags.prompt,)


def lines_of(file: Path, place: Place, flag: str = "--prompts") -> tuple[str, ...]:
    """Prompts as given; a pipe can be read once only, so not by each of torchrun's ranks."""
    try:
        if place.world_size > 1 and stat.S_ISFIFO(file.stat().st_mode):
            raise Refusal(f"{flag} must be a file under torchrun, got the pipe {file}; nearest: --nproc")
        text = file.read_text(encoding="utf-8-sig")  # any file's lines end in \n here; `splitlines` knows ten more ends
    except (OSError, UnicodeDecodeError) as error:
        why, shown = getattr(error, "strerror", None) or "not UTF-8", shortened(str(file))
        raise Refusal(f"{flag} must be a text file, one prompt a line, got {shown} ({why})") from error
    given = tuple(line.strip() for line in text.split("\n") if line.strip())
    if not given:
        raise Refusal(f"{flag} must hold at least one prompt, got the empty file {file}")
    return given
