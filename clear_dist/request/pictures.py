"""A user's picture before it is made larger: whether it can be read, and its new size."""

import json
import warnings
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from clear_dist.cards.folder import ModelFacts
from clear_dist.options import Refusal, shortened
from clear_dist.request.flags import SQUARES, UpscaleFlags
from clear_dist.request.request import Picture
from clear_dist.stages import Size

LARGEST_SAFE = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""Pixels; more is a decompression bomb to Pillow."""
DEFAULT_GROWTH = 2
ORIENTATION, SWAPPED, DESCRIPTION = 0x0112, (5, 6, 7, 8), 0x010E
"""EXIF tags, and the orientations that swap the sides."""
DEEP = ("I", "F")
"""First letters of Pillow's modes with more than 8 bits a channel, which it would cut off."""


def find_picture(flags: UpscaleFlags, facts: ModelFacts, *, unit: int, reads: bool) -> tuple[Picture, Size, str | None]:
    """The picture, its new size in multiples of `unit` pixels, and the prompt in its file.

    `reads`: decode all of it, to refuse a damaged file now; once per machine is enough. Raises a Refusal for a picture
    that cannot be read, is a decompression bomb, or would become smaller.
    """
    picture, prompt = _open(flags.image, reads=reads)
    native = flags.base_res or facts.native_size or 0
    target = _target(flags, picture, native, unit)
    box, asked = _box(picture, target), target[0] * target[1]
    least = max(native, _up_to_unit(max(picture), unit))
    nearest = f"--res {least}" if least <= SQUARES[1] else "none"
    if asked < (box[2] - box[0]) * (box[3] - box[1]):
        raise Refusal(
            f"upscale makes pictures larger, got {target[1]} x {target[0]} for one of {picture[1]} x {picture[0]} px; "
            f"nearest: {nearest}"
        )
    if asked < native * native and max(target) < native:
        whose = "the model's native" if flags.base_res is None else "--base-res,"
        raise Refusal(f"--res must be at least {whose} {native} px, got {max(target)}; nearest: {nearest}")
    return Picture(file=flags.image.absolute(), box=box), target, prompt


def load(picture: Picture) -> Image.Image:
    """The used part of the picture, upright, in RGB."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(picture.file) as image:
            return ImageOps.exif_transpose(image).convert("RGB").crop(picture.box)


def _open(file: Path, *, reads: bool) -> tuple[Size, str | None]:
    shown = shortened(str(file))
    if file.exists() and not file.is_file() and not file.is_dir():  # a pipe can be read once only
        raise Refusal(f"the picture must be a file, got {shown}, which is none")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                if reads:
                    image.load()
                exif, mode, prompt = image.getexif(), image.mode, _prompt(image)
                turned = exif.get(ORIENTATION) in SWAPPED
                height, width = (image.width, image.height) if turned else (image.height, image.width)
    except Image.DecompressionBombError as error:
        raise Refusal(f"the picture must have at most {LARGEST_SAFE} pixels, and {shown} has more ({error})") from error
    except UnidentifiedImageError as error:
        raise Refusal(f"the picture must be one that Pillow reads (png, jpg, webp, tiff ...), got {shown}") from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's for damaged files
        why = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise Refusal(f"the picture must be a file that can be read, got {shown} ({why})") from error
    if mode.startswith(DEEP):
        raise Refusal(f"the picture must have 8 bits a channel, and {shown} has more ({mode}); save it as an 8-bit png")
    return (height, width), prompt


def _prompt(image: Image.Image) -> str | None:
    """Prompt that clear-dist wrote into the file: in a PNG's text chunks, elsewhere as JSON in the description."""
    found = dict(image.info)
    with suppress(TypeError, ValueError):  # others describe as they like
        found |= json.loads(image.getexif().get(DESCRIPTION, "{}"))
    ours = str(found.get("Software", "")).startswith("clear-dist")
    return found["prompt"] if ours and isinstance(found.get("prompt"), str) else None


def _target(flags: UpscaleFlags, picture: Size, native: int, unit: int) -> Size:
    height, width = flags.height, flags.width
    if height is None and width is None:
        most = SQUARES[1]
        longer = flags.res or min(most, _up_to_unit(max(DEFAULT_GROWTH * max(picture), native), unit))
        height, width = (longer, None) if picture[0] >= picture[1] else (None, longer)
    if height is None:
        assert width is not None
        return max(1, round(picture[0] * width / picture[1] / unit)) * unit, width
    return height, width or max(1, round(picture[1] * height / picture[0] / unit)) * unit


def _box(picture: Size, target: Size) -> tuple[int, int, int, int]:
    """Largest box around the picture's centre with the target's shape: left, top, right, bottom."""
    height = min(picture[0], max(1, round(picture[1] * target[0] / target[1])))
    width = min(picture[1], max(1, round(picture[0] * target[1] / target[0])))
    top, left = (picture[0] - height) // 2, (picture[1] - width) // 2
    return left, top, left + width, top + height


def _up_to_unit(side: int, unit: int) -> int:
    return -(-side // unit) * unit
