"""A user's pictures before they are made larger, or drawn anew: whether they can be read, and their new sizes."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageColor, UnidentifiedImageError

from clear_dist.cards.folder import ModelFacts
from clear_dist.options import Refusal, shortened
from clear_dist.pictures.decoding import Decoded, TooDeep, decode
from clear_dist.request.flags import READ_ENDINGS, SQUARES, UPSCALED, GenerateFlags, UpscaleFlags
from clear_dist.request.request import Picture
from clear_dist.stages import Size, size_like

LARGEST_SAFE = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""Pixels; more is a decompression bomb to Pillow."""
DEFAULT_GROWTH = 2
WHITE = "white"
LEAST_WHITE = 128
"""Byte of a mask from which diffusers draws anew."""


def find_files(given: Iterable[Path]) -> Iterator[Path]:
    """Pictures given, and those in folders given, by their names; raises a Refusal for a folder without any."""
    for file in given:
        if not file.is_dir():
            yield file
            continue
        found = sorted(each for each in file.iterdir() if is_listed(each))
        if not found:
            raise Refusal(f"a folder must hold pictures ({', '.join(READ_ENDINGS)}), got {file} without any")
        yield from found


def is_listed(file: Path) -> bool:
    """Whether it is one of a folder's pictures, and no result of before."""
    is_picture = file.suffix.lower() in READ_ENDINGS and not file.name.startswith(".")
    return is_picture and not file.stem.endswith(UPSCALED)


def find_picture(
    file: Path, output: Path, flags: UpscaleFlags, facts: ModelFacts, *, unit: int
) -> tuple[Picture, str | None]:
    """The picture, with its new size in multiples of `unit` pixels, and the prompt in its file.

    All of it is decoded, as it will be when it is its turn. Raises a Refusal for a picture that cannot be read, is a
    decompression bomb, or would become smaller.
    """
    decoded = decoded_file(file)
    picture = decoded.image.height, decoded.image.width
    native = flags.base_res or facts.native_size or 0
    target = _target(flags, picture, native, unit)
    box, asked = _box(picture, target), target[0] * target[1]
    least = max(native, _up_to_unit(max(picture), unit))
    nearest = f"--res {least}" if least <= SQUARES[1] else "none"
    if asked < (box[2] - box[0]) * (box[3] - box[1]):
        raise Refusal(
            f"upscale makes pictures larger, got {target[1]} x {target[0]} for one of {picture[1]} x {picture[0]} px, "
            f"{shortened(str(file))}; nearest: {nearest}"
        )
    if asked < native * native and max(target) < native:
        whose = "the model's native" if flags.base_res is None else "--base-res,"
        raise Refusal(f"--res must be at least {whose} {native} px, got {max(target)}; nearest: {nearest}")
    has_alpha, below = decoded.alpha is not None, _background(flags)
    found = Picture(
        file=file.absolute(),
        box=box,
        target=target,
        output=output,
        background=below,
        has_alpha=has_alpha,
        notes=decoded.notes,
    )
    return found, decoded.prompt


def find_image(flags: GenerateFlags, facts: ModelFacts, *, unit: int) -> Picture | None:
    """The picture that `generate` starts from, with its mask, and its size in multiples of `unit` pixels.

    Both are decoded. Raises a Refusal where one cannot be read, for a mask of another size or without anything white,
    and where no size is known.
    """
    if flags.image is None:
        return None
    decoded, native = decoded_file(flags.image), flags.base_res or facts.native_size
    picture = decoded.image.height, decoded.image.width
    height, width = flags.height or flags.res, flags.width or flags.res
    try:
        target = size_like(picture, height, width, native=native, unit=unit)
    except ValueError as error:
        raise Refusal(
            f"--image needs --res for a model of unknown size, got {facts.name}; nearest: --res 1024"
        ) from error
    is_start = facts.card is None or facts.card.starts_from_pictures
    if flags.mask is not None:
        _check_mask(flags.mask, picture)
    return Picture(
        file=flags.image.absolute(),
        mask=None if flags.mask is None else flags.mask.absolute(),
        box=_box(picture, target) if is_start else (0, 0, picture[1], picture[0]),
        target=target,
        has_alpha=is_start and decoded.alpha is not None,
        notes=decoded.notes,
    )


def _check_mask(file: Path, picture: Size) -> None:
    mask, (height, width) = decoded_file(file).image, picture
    if mask.size != (width, height):
        raise Refusal(
            f"--mask must be as large as --image, {width} x {height} px, got {mask.width} x {mask.height}; "
            f"nearest: a mask of {width} x {height}"
        )
    if not any(mask.convert("L").histogram()[LEAST_WHITE:]):
        raise Refusal(
            f"--mask must be white where the picture is drawn anew, got {file}, which is black; nearest: none"
        )


def load(picture: Picture) -> tuple[Image.Image, Image.Image | None]:
    """The used part of the picture, upright, in RGB, its transparent parts laid on the background; and its alpha."""
    decoded = decoded_file(picture.file)
    alpha = None if decoded.alpha is None else decoded.alpha.crop(picture.box)
    return decoded.laid_on(picture.background).crop(picture.box), alpha


def load_mask(picture: Picture) -> Image.Image | None:
    """The used part of the picture's mask in grey, upright; None: it has none."""
    return None if picture.mask is None else decoded_file(picture.mask).image.crop(picture.box).convert("L")


def decoded_file(file: Path) -> Decoded:
    """A user's picture; raises a Refusal where it cannot be read."""
    shown = shortened(str(file))
    if file.exists() and not file.is_file() and not file.is_dir():  # a pipe can be read once only
        raise Refusal(f"the picture must be a file, got {shown}, which is none")
    try:
        return decode(file)
    except TooDeep as error:
        raise Refusal(
            f"the picture must have 8 bits a channel, and {shown} has more ({error}); save it as an 8-bit png"
        ) from error
    except Image.DecompressionBombError as error:
        raise Refusal(f"the picture must have at most {LARGEST_SAFE} pixels, and {shown} has more ({error})") from error
    except UnidentifiedImageError as error:
        raise Refusal(f"the picture must be one that Pillow reads (png, jpg, webp, tiff ...), got {shown}") from error
    except Exception as error:  # Pillow's for damaged files are of a dozen kinds
        why = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise Refusal(f"the picture must be a file that can be read, got {shown} ({why})") from error


def _background(flags: UpscaleFlags) -> tuple[int, int, int]:
    given = flags.background or WHITE
    with suppress(ValueError):
        colour = ImageColor.getrgb(given)
        if len(colour) == len("RGB"):
            return colour[0], colour[1], colour[2]
    raise Refusal(f"--background must be a colour, by name or #rrggbb, got {shortened(given)!r}; nearest: {WHITE}")


def _target(flags: UpscaleFlags, picture: Size, native: int, unit: int) -> Size:
    height, width = flags.height, flags.width
    if height is None and width is None:
        most = SQUARES[1]
        longer = flags.res or min(most, _up_to_unit(max(DEFAULT_GROWTH * max(picture), native), unit))
        height, width = (longer, None) if picture[0] >= picture[1] else (None, longer)
    return size_like(picture, height, width, native=native, unit=unit)


def _box(picture: Size, target: Size) -> tuple[int, int, int, int]:
    """Largest box around the picture's centre with the target's shape: left, top, right, bottom."""
    height = min(picture[0], max(1, round(picture[1] * target[0] / target[1])))
    width = min(picture[1], max(1, round(picture[0] * target[1] / target[0])))
    top, left = (picture[0] - height) // 2, (picture[1] - width) // 2
    return left, top, left + width, top + height


def _up_to_unit(side: int, unit: int) -> int:
    return -(-side // unit) * unit
