"""`clear-dist upscale` before anything is loaded: what is made of a user's picture, and what is refused."""

import os
import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from clear_dist.cards.folder import ModelFacts, find_model
from clear_dist.families.cards import CARDS
from clear_dist.launch.env import Place
from clear_dist.options import Refusal
from clear_dist.pictures import save_picture
from clear_dist.pictures.srgb import profile
from clear_dist.request.flags import UpscaleFlags
from clear_dist.request.pictures import find_picture, load
from clear_dist.request.request import Request
from clear_dist.request.settle import settle
from tests.pictures.test_decoding import damaged
from tests.tiny import make_tiny_flux

ALONE = Place()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_flux(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def picture(height: int, width: int, name: str = "in.png", **options: Any) -> Path:
    values = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(name, **options)
    return Path(name)


def checked(model: Path, *images: Path | str, **given: Any) -> Request:
    return settle(UpscaleFlags(model=str(model), images=list(map(str, images)), **given), ALONE, CARDS)[0]


def test_twice_the_size_without_a_word(model: Path) -> None:
    request = checked(model, picture(200, 120))
    assert request.size == (400, 240)
    assert request.picture is not None
    assert request.picture.box == (0, 0, 120, 200)
    assert [stage.size for stage in request.stages] == [(400, 240)]
    assert request.prompts == ("",)


@pytest.mark.parametrize(
    ("given", "size", "box"),
    [
        ({"res": 512}, (512, 304), (0, 1, 120, 201)),  # 303 px are no whole tokens: a row or two less of the picture
        ({"width": 480}, (800, 480), (0, 0, 120, 200)),
        ({"height": 480, "width": 480}, (480, 480), (0, 40, 120, 160)),
    ],
)
def test_sizes_that_were_left_open_follow_from_the_picture(
    model: Path, given: dict[str, int], size: tuple[int, int], box: tuple[int, ...]
) -> None:
    request = checked(model, picture(200, 120), **given)
    assert request.size == size
    assert request.picture is not None
    assert all(abs(got - expected) <= 1 for got, expected in zip(request.picture.box, box, strict=True))
    height, width = request.picture.size
    assert abs(height / width - size[0] / size[1]) < 0.02


def test_a_small_picture_is_refined_at_the_native_size_first(model: Path) -> None:
    assert [stage.size for stage in checked(model, picture(50, 50), res=256).stages] == [(128, 128), (256, 256)]
    assert checked(model, picture(50, 50)).size == (128, 128)


def test_pictures_are_turned_upright_and_cropped(model: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    file = picture(120, 200, "lying.jpg", exif=exif)
    request = checked(model, file, height=256, width=256)
    assert request.picture is not None
    assert request.picture.box == (0, 40, 120, 160)
    upright = Image.open(file).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(load(request.picture)[0]), np.asarray(upright.crop((0, 40, 120, 160))))


def test_the_prompt_in_the_file_is_used(model: Path) -> None:
    chunks = PngInfo()
    chunks.add_itxt("prompt", "a red fox")
    assert checked(model, picture(128, 128, pnginfo=chunks)).prompts == ("",)  # another program's
    chunks.add_itxt("Software", "clear-dist 0.1.0")
    file = picture(128, 128, pnginfo=chunks)
    assert checked(model, file).prompts == ("a red fox",)
    assert checked(model, file, "two dogs").prompts == ("two dogs",)
    assert checked(model, file, "").prompts == ("",)


@pytest.mark.parametrize("orientation", [9, 65535])
def test_orientations_that_are_none_turn_nothing(model: Path, orientation: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    request = checked(model, picture(120, 200, "in.jpg", exif=exif))
    assert request.picture is not None
    assert request.picture.size == (120, 200)
    assert load(request.picture)[0].size == (200, 120)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif"])
def test_prompts_are_found_in_every_format(model: Path, ending: str) -> None:
    rows = np.zeros((128, 128, 3), dtype=np.uint8)
    file = Path(f"in.{ending}")
    save_picture([rows], file, height=128, width=128, metadata={"prompt": "a red fox", "Software": "clear-dist 9"})
    request, _, lines = settle(UpscaleFlags(model=str(model), images=[str(file)]), ALONE, CARDS)
    assert request.prompts == ("a red fox",)
    assert "prompt: 'a red fox' (from the picture's metadata)" in lines


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"res": 64},
            r"upscale makes pictures larger, got 64 x 64 for one of 200 x 200 px, in.png; nearest: --res 208",
        ),
        ({"res": 256, "save_stages": True, "output": Path("in.png")}, r"nearest: --output in-new.png"),
        ({"res": 300}, r"--res must be a multiple of 16 pixels"),
        ({"height": 416, "width": 417}, r"--width must be a multiple of 16 pixels"),
        ({"output": Path("in.png")}, r"must be different files"),
        ({"nproc": 99, "res": 256}, r"16 rows of tokens can be cut for 1 to 16 ranks, got 99; nearest: 16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(model: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        checked(model, picture(200, 200), **given)


def test_a_target_below_the_native_size_is_refused(model: Path) -> None:
    with pytest.raises(Refusal, match="--res must be at least the model's native 128 px, got 96; nearest: --res 128"):
        checked(model, picture(32, 32), res=96)
    with pytest.raises(Refusal, match=r"larger, got 48 x 48 for one of 64 x 64 px, in\.png; nearest: --res 128"):
        checked(model, picture(64, 64), res=48)


@pytest.mark.parametrize("name", ["out.preview.png", "out.256x256.png"])
def test_what_is_written_beside_the_output_never_replaces_the_picture(model: Path, name: str) -> None:
    flags = {"output": Path("out.png"), "save_stages": True, "preview_every": 1}
    with pytest.raises(Refusal, match=f"must be different files, got {name} twice"):
        checked(model, picture(128, 128, name), res=512, **flags)


@pytest.mark.parametrize("flags", [{"save_stages": True}, {"preview_every": 1}])
def test_names_too_long_for_what_is_written_beside_are_refused(model: Path, flags: dict[str, Any]) -> None:
    with pytest.raises(Refusal, match="must be a file that can be written"):
        checked(model, picture(128, 128), res=512, output=Path(f"{'a' * 250}.png"), **flags)


def bomb(file: Path) -> None:
    """The head of a PNG of 20000 x 20000 pixels."""
    picture(8, 8, str(file))
    data = bytearray(file.read_bytes())
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: None, "a file that can be read, got in.png .No such file"),
        (lambda file: file.write_bytes(b"no picture"), "one that Pillow reads"),
        (lambda file: file.write_bytes(b""), "one that Pillow reads"),
        (lambda file: file.mkdir(), "a folder must hold pictures .*, got in.png without any"),
        (lambda file: file.write_bytes(picture(64, 64, "whole.png").read_bytes()[:2000]), "a file that can be read"),
        (bomb, "at most 178956970 pixels"),
        (os.mkfifo, "must be a file, got in.png"),
        (lambda file: Image.new("I;16", (64, 64)).save(file), "8 bits a channel, and in.png has more .I;16.; save"),
    ],
)
def test_pictures_that_cannot_be_read_are_refused(model: Path, make: Any, message: str) -> None:
    make(Path("in.png"))
    with pytest.raises(Refusal, match=message) as caught:
        checked(model, Path("in.png"))
    assert "\n" not in str(caught.value)


def said_of(file: Path, flags: UpscaleFlags, facts: ModelFacts) -> str:
    """The refusal of a picture; nothing where it can be loaded as it was checked."""
    try:
        found, _ = find_picture(file, Path("out.png"), flags, facts, unit=16)
    except Refusal as refusal:
        return str(refusal)
    assert load(found)[0].size == found.size[::-1]
    return ""


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp", "gif"])
def test_damaged_pictures_are_refused_in_a_line_or_load(model: Path, ending: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if ending == "gif" else {"exif": exif, "icc_profile": profile()}
    whole, file, rng = (
        picture(64, 64, f"whole.{ending}", **options).read_bytes(),
        Path(f"in.{ending}"),
        random.Random(1),
    )
    facts, flags = find_model(str(model), CARDS, has_cuda=False), UpscaleFlags(model=str(model), images=[str(file)])
    said = []
    for _ in range(60):
        file.write_bytes(damaged(whole, rng))
        said.append(said_of(file, flags, facts))
    assert "" in said and any(said)
    assert [line for line in said if "\n" in line] == []
