"""The start of a request, noise or a picture: prompts, size, and how it is denoised."""

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from clear_dist import demo
from clear_dist.cards.folder import ModelFacts
from clear_dist.launch.env import Place
from clear_dist.options import Refusal, spelled
from clear_dist.pictures import numbered
from clear_dist.refining import REFINEMENTS
from clear_dist.request.flags import UPSCALED, GenerateFlags, PictureFlags, UpscaleFlags
from clear_dist.request.lines import Line, read_list
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
    lines: tuple[Line, ...] = ()
    """One for each prompt where any has more of its own."""


def find_start(flags: PictureFlags, facts: ModelFacts, place: Place, *, unit: int) -> Start:
    """The start asked for; raises a Refusal for unreadable prompts or picture, or a side not in whole `unit` pixels."""
    for name in ("res", "height", "width", "base_res"):
        check_units(spelled(name), getattr(flags, name), unit, facts.token_size)
    if isinstance(flags, UpscaleFlags):
        return _from_pictures(flags, facts, place, unit)
    assert isinstance(flags, GenerateFlags), flags
    given, picture = _lines(flags, facts, place), find_image(flags, facts, unit=unit)
    height, width = flags.height or flags.res, flags.width or flags.res
    if picture is not None:
        height, width = picture.target
        _refuse_sizes(given)
    size = height or facts.native_size, width or facts.native_size
    lines, height, width = _sized(_own(given, flags.output), *size, unit, facts.token_size)
    sampling = replace(facts.sampling, **_given(flags, "steps", *GUIDANCE))
    is_start = picture is not None and (facts.card is None or facts.card.starts_from_pictures)
    return Start(
        prompts=tuple(line.prompt for line in given),
        lines=lines,
        height=height,
        width=width,
        sampling=ImageToImage.of(sampling, flags.strength) if is_start else sampling,
        output=flags.output,
        num_images=flags.num_images,
        cascade=flags.cascade == "auto",
        pictures=() if picture is None else (picture,) * len(given),
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
    lines = None if flags.prompts is None else read_list(flags.prompts, place)
    if lines is not None and len(lines) != count:
        raise Refusal(f"--prompts must hold a prompt for each of {count} pictures, got {len(lines)}; nearest: {count}")
    _refuse_sizes(lines or ())
    own_lines = _own(lines or (), flags.output)
    pictures, prompts, outputs = [], [], []
    for index, file in enumerate(files):
        output = Path(f"{file.stem}{UPSCALED}.png") if flags.output is None else numbered(flags.output, index, count)
        output = (own_lines[index].output if own_lines else None) or output
        picture, own = find_picture(file, output, flags, facts, unit=unit)
        pictures.append(picture)
        outputs.append(output)
        given = flags.prompt if lines is None else lines[index].prompt
        prompts.append((own or "") if given is None else given)
    height, width = max((picture.target for picture in pictures), key=prod)
    return Start(
        prompts=tuple(prompts),
        height=height,
        width=width,
        sampling=facts.sampling,
        output=flags.output or outputs[0],
        pictures=tuple(pictures),
        lines=own_lines,
    )


def _refuse_sizes(lines: tuple[Line, ...]) -> None:
    if any(line.height for line in lines):
        raise Refusal("size in --prompts is for pictures from noise, got one to start from; nearest: --res")


def check_units(name: str, size: int | None, unit: int, token: int) -> None:
    """Raises a Refusal where a side in pixels, called `name`, is not in whole `unit` pixels."""
    if size is not None and size % unit:
        below = size // unit * unit
        nearest = " or ".join(str(near) for near in (below, below + unit) if near)
        tokens = "one token" if unit == token else f"{unit // token} tokens, which CLEAR's down-sampled keys stand for"
        shown = f"{name} must be a multiple of {unit} pixels ({tokens})"
        raise Refusal(f"{shown}, got {size}; nearest: {nearest}")


def _lines(flags: GenerateFlags, facts: ModelFacts, place: Place) -> tuple[Line, ...]:
    if flags.prompts is not None:
        return read_list(flags.prompts, place)
    default = demo.DEFAULT_PROMPT if facts.is_demo else DEFAULT_PROMPT
    return (Line(prompt=default if flags.prompt is None else flags.prompt),)


def _own(lines: tuple[Line, ...], output: Path | None) -> tuple[Line, ...]:
    """Lines with outputs in the folder of `output`; none where all are prompts alone."""
    folder = Path() if output is None else output.parent
    placed = (line if line.output is None else replace(line, output=folder / line.output) for line in lines)
    return () if all(line.is_prompt_alone for line in lines) else tuple(placed)


def _sized(
    lines: tuple[Line, ...], height: int | None, width: int | None, unit: int, token: int
) -> tuple[tuple[Line, ...], int | None, int | None]:
    """Lines with all sizes, and the largest; raises a Refusal for one not in whole `unit` pixels, or unknown."""
    for side in (side for line in lines for side in (line.height, line.width)):
        check_units("size in --prompts", side, unit, token)
    if height is None or width is None:
        if any(line.height for line in lines):
            raise Refusal("size in --prompts needs one for the other lines, got none; nearest: --res 1024")
        return lines, height, width
    sizes = [(line.height or height, line.width or width) for line in lines]
    sized = (replace(line, height=tall, width=wide) for line, (tall, wide) in zip(lines, sizes, strict=True))
    return tuple(sized), *max(sizes, key=prod, default=(height, width))
