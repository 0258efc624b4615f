"""A picture that somebody else wrote: its pixels in 8-bit sRGB, upright, with what has to be said about it."""

import io
import json
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageCms

ORIENTATION, DESCRIPTION = 0x0112, 0x010E
"""EXIF tags."""
UPRIGHT = dict(
    enumerate(
        (
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
        start=2,
    )
)
"""What turns a picture upright, by its orientation. `ImageOps.exif_transpose` writes the EXIF anew, and may fail."""
DEEP = ("I", "F")
"""First letters of Pillow's modes with more than 8 bits a channel, which it would cut off."""
SRGB_GAMMA, CLOSE = 1 / 2.2, 0.01
SPACES = {"1": "GRAY", "L": "GRAY", "LA": "GRAY", "CMYK": "CMYK", "LAB": "Lab"}
"""Colour spaces of profiles, by Pillow's modes; RGB serves all."""
SIGNATURE, TEXT, PIXELS = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt"), b"tRNS"
"""A PNG's first bytes, its texts, and what of its extras makes pixels."""


class TooDeep(ValueError):
    """More than 8 bits a channel, which Pillow cannot narrow."""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    image: Image.Image
    """RGB, below transparent parts too."""
    alpha: Image.Image | None
    """None: nothing is transparent."""
    prompt: str | None
    """The one that clear-dist wrote into the file."""
    notes: tuple[str, ...]
    """What was left out or could not be read."""

    def laid_on(self, background: tuple[int, int, int]) -> Image.Image:
        """RGB whose transparent parts show the background, not what they hide."""
        if self.alpha is None:
            return self.image
        return Image.composite(self.image, Image.new("RGB", self.image.size, background), self.alpha)


def decode(file: Path) -> Decoded:
    """All of a picture; raises whatever Pillow does where its pixels cannot be read."""
    notes: list[str] = []
    with _warnings_told(notes):
        try:
            with Image.open(file) as image:
                found = decoded(image)
        except Exception:
            with file.open("rb") as raw:
                if raw.read(len(SIGNATURE)) != SIGNATURE:
                    raise
                notes.append("its texts and damaged extras are not read")
                with Image.open(_without_metadata(raw.read())) as image:
                    found = decoded(image)
    return replace(found, notes=(*notes, *found.notes))


def decoded(image: Image.Image) -> Decoded:
    """`decode` for a picture that is open."""
    found: list[str] = []
    prompt, orientation = None, 1
    with _warnings_told(found):
        narrowed = ";16" in str(getattr(image, "tile", ""))  # how a decoder's layout is spelled; the mode has 8 bits
        image.load()
        if image.mode.startswith(DEEP):
            raise TooDeep(image.mode)
        if narrowed:
            found.append("8 of its 16 bits a channel are used")
        gamma = image.info.get("gamma", SRGB_GAMMA)
        if abs(gamma - SRGB_GAMMA) > CLOSE and not {"srgb", "icc_profile"} & image.info.keys():
            found.append(f"its gamma of {gamma:g} is not used")
        with _told(found, "its EXIF"):
            orientation = image.getexif().get(ORIENTATION, 1)
        with _told(found, "its prompt"):
            prompt = _prompt(image)
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        pixels = _in_srgb(image, found)
        with _told(found, "the number of its frames"):
            if (frames := getattr(image, "n_frames", 1)) > 1:
                found.append(f"the first of its {frames} frames is used")
    pixels.info.clear()  # of the original: these pixels are upright, and in sRGB
    if alpha is not None and alpha.getextrema() == (255, 255):
        alpha = None
    if isinstance(orientation, int) and (turn := UPRIGHT.get(orientation)) is not None:
        pixels = pixels.transpose(turn)
        alpha = None if alpha is None else alpha.transpose(turn)
    return Decoded(image=pixels, alpha=alpha, prompt=prompt, notes=tuple(found))


@contextmanager
def _warnings_told(notes: list[str]) -> Iterator[None]:
    """Notes of EXIF that Pillow warns it could not read; its other warnings are of no concern here."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield
    found = dict.fromkeys(" ".join(str(each.message).split())[:80] for each in warned)
    notes += [f"its EXIF cannot be read ({why})" for why in found if "EXIF" in why]


@contextmanager
def _told(notes: list[str], what: str) -> Iterator[None]:
    """Metadata are no reason to lose a picture, and fail in many ways."""
    try:
        yield
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        notes.append(f"{what} cannot be read ({why[:80]})")


def _in_srgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """RGB by the picture's profile; as it is where it has none, or none that can be used."""
    with _told(notes, "its colour profile"):
        if icc := image.info.get("icc_profile"):
            own, srgb = ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB")
            space = own.profile.xcolor_space.strip()
            if space not in ("RGB", SPACES.get(image.mode)):
                raise ValueError(f"it is for {space}, the picture is {image.mode}")
            plain = image.convert({"GRAY": "L", "Lab": "LAB"}.get(space, space))
            return ImageCms.profileToProfile(plain, own, srgb, outputMode="RGB") or plain
    return image.convert("RGB")


def written_metadata(file: Path) -> dict[str, str] | None:
    """Metadata of a picture, as `save_picture` was given them; None: there are none, or they cannot be read."""
    with suppress(Exception), warnings.catch_warnings(action="ignore"), Image.open(file) as image:
        found = image.info if image.format == "PNG" else json.loads(image.getexif()[DESCRIPTION])
        return {str(name): value for name, value in found.items() if isinstance(value, str)}
    return None


def _prompt(image: Image.Image) -> str | None:
    """Prompt that clear-dist wrote into the file: in a PNG's text chunks, elsewhere as JSON in the description."""
    found = dict(image.info)
    with suppress(TypeError, ValueError, RecursionError):  # others describe as they like
        found |= json.loads(image.getexif().get(DESCRIPTION, "{}"))
    prompt = found.get("prompt")
    if not str(found.get("Software", "")).startswith("clear-dist") or not isinstance(prompt, str):
        return None
    prompt.encode()  # raises for what is no text, to JSON it is
    return prompt


def _without_metadata(data: bytes) -> io.BytesIO:
    """A PNG's chunks without texts, which Pillow refuses where they are long, and without other damaged extras."""
    kept, start = [SIGNATURE], 0
    while start + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[start : start + 8])
        end = start + 12 + length
        is_whole = data[end - 4 : end] == struct.pack(">I", zlib.crc32(data[start + 4 : end - 4]))
        if kind[:1].isupper() or kind == PIXELS or (is_whole and kind not in TEXT):
            kept.append(data[start:end])
        start = end
    return io.BytesIO(b"".join(kept))
