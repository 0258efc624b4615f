"""Sets of pictures that are compared: pairs by name, checked before anything is loaded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from clear_dist.launch.env import Place
from clear_dist.options import Refusal, shortened
from clear_dist.pictures.decoding import ORIENTATION
from clear_dist.request.evaluate import EvaluateFlags
from clear_dist.request.flags import READ_ENDINGS
from clear_dist.request.lines import lines_of
from clear_dist.request.pictures import decoded_file
from clear_dist.stages import Size

MADE_BESIDE = (".preview", ".thumbnail")
"""Ends of the names of small pictures that `generate` writes beside a large one."""
WHITE = (255, 255, 255)
"""Below transparent parts."""
LYING = 5
"""First EXIF orientation that swaps height and width."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A picture, and what it is compared with (None: nothing)."""

    name: str
    size: Size
    picture: Path
    other: Path | None = None
    condition: Path | None = None
    caption: str | None = None


def find_samples(flags: EvaluateFlags, place: Place) -> tuple[Sample, ...]:
    """All samples by name, all with the same kinds of company.

    Raises a Refusal for sets of unequal length, names or sizes, for pictures that cannot be read, and where some
    pictures have a caption and others have none.
    """
    pictures = _named("PICTURES", flags.pictures)
    others = _beside(pictures, flags.pictures, "--against", flags.against)
    conditions = _beside(pictures, flags.pictures, "--conditions", flags.conditions)
    captions = _captions(pictures, flags, place)
    return tuple(
        Sample(
            name=name,
            size=_require_size(file, others.get(name), conditions.get(name)),
            picture=file,
            other=others.get(name),
            condition=conditions.get(name),
            caption=captions.get(name),
        )
        for name, file in pictures.items()
    )


def _named(flag: str, folder: Path) -> dict[str, Path]:
    """Pictures of a folder, in the order of their names, without endings."""
    shown = shortened(str(folder))
    if not folder.is_dir():
        raise Refusal(f"{flag} must be a folder of pictures, got {shown}, which is none")
    files = sorted(each for each in folder.iterdir() if _is_picture(each))
    if not files:
        raise Refusal(f"{flag} must hold pictures ({', '.join(READ_ENDINGS)}), got {shown} without any")
    named: dict[str, Path] = {}
    for file in files:
        if (twin := named.setdefault(file.stem, file)) is not file:
            raise Refusal(f"{flag} must have each name once, got {twin.name} and {file.name}; leave one out")
    return dict(sorted(named.items()))


def _is_picture(file: Path) -> bool:
    is_own = not file.name.startswith(".") and not file.stem.endswith(MADE_BESIDE)
    return is_own and file.suffix.lower() in READ_ENDINGS


def _beside(pictures: Mapping[str, Path], where: Path, flag: str, folder: Path | None) -> dict[str, Path]:
    """Pictures of the same names in another folder; none where there is no folder."""
    if folder is None:
        return {}
    others = _named(flag, folder)
    if len(others) != len(pictures):
        raise Refusal(
            f"{flag} must hold as many pictures as {where}, {len(pictures)}, got {len(others)} in {folder}; "
            f"{_first_alone(pictures, others)}"
        )
    if pictures.keys() != others.keys():
        raise Refusal(f"{flag} must hold pictures of the same names as {where}; {_first_alone(pictures, others)}")
    return others


def _first_alone(pictures: Mapping[str, Path], others: Mapping[str, Path]) -> str:
    alone = min(pictures.keys() ^ others.keys())
    file = pictures.get(alone) or others[alone]
    return f"the first without its like is {file}"


def _captions(pictures: Mapping[str, Path], flags: EvaluateFlags, place: Place) -> dict[str, str]:
    """The prompts file's lines, else the texts beside the pictures; none where there are neither."""
    if flags.prompts is not None:
        lines = lines_of(flags.prompts, place)
        if len(lines) != len(pictures):
            raise Refusal(
                f"--prompts must have a line for each of {len(pictures)} pictures, got {len(lines)} in {flags.prompts}"
            )
        return dict(zip(pictures, lines, strict=True))
    captions = dict(_texts_beside(pictures))
    if captions and len(captions) < len(pictures):
        alone = next(file for name, file in pictures.items() if name not in captions)
        raise Refusal(
            f"each picture must have a caption or none has, got {len(captions)} for {len(pictures)}, none for {alone}; "
            f"nearest: {alone.with_suffix('.txt')}"
        )
    return captions


def _texts_beside(pictures: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    for name, file in pictures.items():
        text = file.with_suffix(".txt")
        if text.exists():
            try:
                caption = " ".join(text.read_text(encoding="utf-8").split())
            except (OSError, UnicodeDecodeError) as error:
                raise Refusal(f"the caption must be a text in UTF-8, got {text} ({error})") from error
            if not caption:
                raise Refusal(f"the caption must say something, got {text}, which is empty")
            yield name, caption


def _require_size(file: Path, *beside: Path | None) -> Size:
    size = size_of(file)
    for other in beside:
        if other is not None and (found := size_of(other)) != size:
            raise Refusal(
                f"pictures of a name must have one size, got {size[1]} x {size[0]} px in {file} and "
                f"{found[1]} x {found[0]} in {other}"
            )
    return size


def size_of(file: Path) -> Size:
    """Height and width once it is upright, from the head of the file."""
    try:
        with Image.open(file) as image:
            width, height = image.size
            lies = image.getexif().get(ORIENTATION, 1) >= LYING
    except Exception:  # decoding repairs some, and tells of the others what is wrong
        whole = opened(file)
        return whole.height, whole.width
    return (width, height) if lies else (height, width)


def opened(file: Path) -> Image.Image:
    """RGB, upright, on white; a Refusal where it cannot be read."""
    return decoded_file(file).laid_on(WHITE)


def common_size(samples: Sequence[Sample]) -> Size | None:
    """The size of all pictures; None: they differ."""
    sizes = {each.size for each in samples}
    return sizes.pop() if len(sizes) == 1 else None
