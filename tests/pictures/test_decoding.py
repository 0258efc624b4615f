"""Pictures as other programs write them, and damaged ones: decoded whole, or not at all."""

import json
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo

from clear_dist.pictures.decoding import TooDeep, decode

HEIGHT, WIDTH = 12, 20
COLOURS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
OPACITY = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH)
ORIENTATION, DESCRIPTION, LYING = 0x0112, 0x010E, 6
SIGNATURE_AND_HEAD = 33
"""Bytes of a PNG."""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def saved(name: str, values: np.ndarray = COLOURS, mode: str | None = None, **options: Any) -> Path:
    image = Image.fromarray(values)
    (image if mode is None else image.convert(mode)).save(name, **options)
    return Path(name)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def deep_png(name: str, values: np.ndarray, colour: int) -> Path:
    """A PNG of 16 bits a channel, which Pillow does not write."""
    head = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, colour, 0, 0, 0)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b""))
    Path(name).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return Path(name)


def described(text: str) -> Image.Exif:
    exif = Image.Exif()
    exif[DESCRIPTION] = text
    return exif


def red_is_blue() -> bytes:
    """A profile of sRGB's primaries, the first and the last exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", profile[128:132])[0]
    places = dict(struct.unpack(">4sI", profile[132 + 12 * each :][:8]) for each in range(count))
    red, blue = (slice(places[name] + 8, places[name] + 20) for name in (b"rXYZ", b"bXYZ"))
    profile[red], profile[blue] = profile[blue], profile[red]
    return bytes(profile)


@pytest.mark.parametrize("ending", ["png", "webp", "tif"])
def test_transparency_is_kept_apart(ending: str) -> None:
    options = {"lossless": True, "exact": True} if ending == "webp" else {}
    decoded = decode(saved(f"in.{ending}", np.dstack([COLOURS, OPACITY]), **options))
    assert decoded.alpha is not None
    assert np.array_equal(np.asarray(decoded.alpha), OPACITY)
    assert np.array_equal(np.asarray(decoded.image), COLOURS)


def test_one_transparent_colour_is_transparency_too() -> None:
    file = saved("in.png", np.where(OPACITY < 100, 7, 200).astype(np.uint8), transparency=7)
    alpha = decode(file).alpha
    assert alpha is not None
    assert np.array_equal(np.asarray(alpha), np.where(OPACITY < 100, 0, 255))


def test_an_opaque_picture_has_none() -> None:
    assert decode(saved("in.png", np.dstack([COLOURS, np.full_like(OPACITY, 255)]))).alpha is None


@pytest.mark.parametrize("name", ["in.png", "in.tif"])
def test_colours_are_those_of_the_profile(name: str) -> None:
    decoded = decode(saved(name, icc_profile=red_is_blue()))
    assert np.abs(np.asarray(decoded.image).astype(int) - COLOURS[..., ::-1]).max() <= 1
    assert decoded.notes == ()


def test_a_profile_is_used_below_transparency_too() -> None:
    decoded = decode(saved("in.png", np.dstack([COLOURS, OPACITY]), icc_profile=red_is_blue()))
    assert np.abs(np.asarray(decoded.image).astype(int) - COLOURS[..., ::-1]).max() <= 1
    assert decoded.alpha is not None


@pytest.mark.parametrize("profile", [b"none", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()])
def test_profiles_that_cannot_be_used_are_told(profile: bytes) -> None:
    decoded = decode(saved("in.png", icc_profile=profile))
    assert np.array_equal(np.asarray(decoded.image), COLOURS)
    assert len(decoded.notes) == 1 and "its colour profile cannot be read" in decoded.notes[0]


def test_what_is_left_out_is_told() -> None:
    animated = [Image.fromarray(values).convert("P") for values in (COLOURS, 255 - COLOURS)]
    animated[0].save("in.gif", save_all=True, append_images=animated[1:])
    assert decode(Path("in.gif")).notes == ("the first of its 2 frames is used",)
    linear = PngInfo()
    linear.add(b"gAMA", struct.pack(">I", 100_000))
    assert decode(saved("linear.png", pnginfo=linear)).notes == ("its gamma of 1 is not used",)
    deep = decode(deep_png("rgb16.png", COLOURS * np.uint16(257), colour=2))
    assert deep.notes == ("8 of its 16 bits a channel are used",)
    assert np.array_equal(np.asarray(deep.image), COLOURS)
    with pytest.raises(TooDeep):
        decode(deep_png("grey16.png", COLOURS[..., 0] * np.uint16(257), colour=0))


def test_a_turned_picture_with_an_odd_tag_is_turned() -> None:
    """The unit of its resolution, a number by the standard, is text."""
    file = saved("in.jpg", quality=95)
    plain, entries = file.read_bytes(), [(ORIENTATION, 3, 1, b"\6\0\0\0"), (0x0128, 2, 2, b"2\0\0\0")]
    directory = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4)
    file.write_bytes(plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:])
    upright = np.asarray(decode(file).image)
    saved("plain.jpg", quality=95)
    assert np.array_equal(upright, np.rot90(np.asarray(Image.open("plain.jpg")), -1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_every_orientation_is_turned_as_pillow_does(orientation: int, ending: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = saved(f"in.{ending}", np.dstack([COLOURS, OPACITY]), exif=exif)
    decoded = decode(file)
    assert decoded.alpha is not None
    with Image.open(file) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(np.dstack([decoded.image, decoded.alpha]), expected)


@pytest.mark.parametrize(
    "text",
    ["[" * 3000, "5" * 5000, "[1, 2]", '"words"', '{"Software": 7, "prompt": {"a": 1}}', "words", "{"],
    ids=["deep", "long", "list", "text", "types", "words", "half"],
)
def test_descriptions_of_others_are_no_prompts(text: str) -> None:
    decoded = decode(saved("in.jpg", exif=described(text)))
    assert (decoded.prompt, decoded.notes) == (None, ())


def test_a_prompt_of_ours_that_is_no_text_is_told() -> None:
    text = json.dumps({"Software": "clear-dist 0.1.0", "prompt": "a \ud83d cat"})
    decoded = decode(saved("in.jpg", exif=described(text)))
    assert decoded.prompt is None
    assert len(decoded.notes) == 1 and "its prompt cannot be read" in decoded.notes[0]


@pytest.mark.parametrize("after", [False, True])
def test_texts_that_pillow_refuses_do_not_lose_a_png(after: bool) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = LYING
    file = saved("in.png", exif=exif)
    data = file.read_bytes()
    at = data.index(b"IEND") - 4 if after else SIGNATURE_AND_HEAD
    file.write_bytes(data[:at] + chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2_000_000))) + data[at:])
    decoded = decode(file)
    assert np.array_equal(np.asarray(decoded.image), np.rot90(COLOURS, -1))
    assert decoded.notes == ("its texts and damaged extras are not read",)


@pytest.mark.parametrize("kind", [b"eXIf", b"iCCP", b"gAMA"])
def test_damaged_extras_do_not_lose_a_png(kind: bytes) -> None:
    file = saved("in.png")
    data, broken = file.read_bytes(), chunk(kind, bytes(4))
    file.write_bytes(data[:SIGNATURE_AND_HEAD] + broken[:-1] + b"x" + data[SIGNATURE_AND_HEAD:])
    decoded = decode(file)
    assert np.array_equal(np.asarray(decoded.image), COLOURS)
    assert decoded.notes == ("its texts and damaged extras are not read",)


def damaged(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(min(len(data), 400))] = rng.choice((0, 255, rng.randrange(256)))
    return bytes(changed)


def test_an_exif_that_leads_nowhere_is_told() -> None:
    """Pillow warns of it, while it opens the file."""
    turned = Image.Exif()
    turned[ORIENTATION] = LYING
    data = saved("x.jpg", exif=turned).read_bytes()
    start = data.index(b"Exif\0\0") + 6
    Path("x.jpg").write_bytes(data[:start] + b"MM\0*\xff\xff\xff\xf0" + data[start + 8 :])
    assert "its EXIF cannot be read" in " ".join(decode(Path("x.jpg")).notes)
