import io
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from clear_dist.pictures import files_of, numbered, replacing, save_picture
from clear_dist.pictures.alpha import Alpha
from clear_dist.pictures.decoding import written_metadata
from clear_dist.pictures.whole import EXIF_DESCRIPTION, EXIF_SOFTWARE
from tests.pictures.rows import noise, split

METADATA = {"prompt": "ein Fuß im Schnee", "seed": "7", "Software": "clear-dist 0", "settings": '{"steps": 2}'}
ENDINGS = [".png", ".PNG", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".TIFF"]


def save(file: Path, metadata: Mapping[str, str] | None = METADATA) -> None:
    red = np.full((16, 32, 3), (255, 0, 0), np.uint8)
    assert save_picture(split(red), file, height=16, width=32, metadata=metadata) == [file]


@pytest.mark.parametrize("ending", ENDINGS)
def test_pictures_carry_what_made_them(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"picture{ending}"
    save(file)
    assert os.listdir(tmp_path) == [file.name]
    with Image.open(file) as picture:
        picture.load()
        assert picture.size == (32, 16)
        assert np.abs(np.asarray(picture).astype(int) - (255, 0, 0)).max() < 8
        exif = picture.getexif()
        if ending.lower() == ".png":
            found = picture.text  # type: ignore[attr-defined]
        else:
            found = json.loads(exif[EXIF_DESCRIPTION])
            assert exif[EXIF_SOFTWARE] == METADATA["Software"]
    assert found == METADATA == written_metadata(file)


@pytest.mark.parametrize("ending", ENDINGS)
def test_pictures_carry_nothing_if_so_asked(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"picture{ending}"
    save(file, metadata=None)
    with Image.open(file) as picture:
        picture.load()
        exif = picture.getexif()
        assert EXIF_DESCRIPTION not in exif and EXIF_SOFTWARE not in exif
        assert not getattr(picture, "text", {})


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tiff"])
@pytest.mark.parametrize("letter", ["a", "ß"])
def test_long_prompts_are_cut_where_they_do_not_fit(tmp_path: Path, ending: str, letter: str) -> None:
    file = tmp_path / f"picture{ending}"
    save(file, METADATA | {"prompt": letter * 100_000})
    with Image.open(file) as picture:
        text = getattr(picture, "text", None)
        found = text or json.loads(picture.getexif()[EXIF_DESCRIPTION])
    if ending in (".png", ".tiff"):
        assert found["prompt"] == letter * 100_000
    else:
        assert found["prompt"].startswith(letter * 5_000) and found["prompt"].endswith("...")
    assert found["settings"] == METADATA["settings"]


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    file = tmp_path / f"{'x' * 251}.png"
    save(file)
    assert os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize("ending", [".png", ".tiff", ".jpg"])
def test_memory_does_not_grow_with_the_height(tmp_path: Path, ending: str) -> None:
    """numpy's arrays are counted, Pillow's images are not: a JPEG is assembled in one of those."""
    side, stripe = 6000, 500

    def rows() -> Iterator[np.ndarray]:
        for _ in range(side // stripe):
            yield np.zeros((stripe, side, 3), np.uint8)

    tracemalloc.start()
    try:
        save_picture(rows(), tmp_path / f"a{ending}", height=side, width=side, metadata=METADATA)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < stripe * side * 3 + 6e6  # one stripe (9 MB), not two, and some blocks of 0.3 MB


@pytest.mark.parametrize("ending", [".png", ".tiff", ".jpg", ".webp"])
def test_a_large_picture_whose_rows_end_in_an_error_leaves_nothing(tmp_path: Path, ending: str) -> None:
    def rows() -> Iterator[np.ndarray]:
        yield np.zeros((40, 5000, 3), np.uint8)
        raise OSError("a rank is lost")

    with pytest.raises(OSError, match="a rank is lost"):
        save_picture(rows(), tmp_path / f"a{ending}", height=100, width=5000, metadata=METADATA)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("ending", [".png", ".tiff", ".jpg", ".webp"])
@pytest.mark.parametrize("height", [15, 16, 31, 33, 64])
def test_rows_must_be_as_many_as_said(tmp_path: Path, ending: str, height: int) -> None:
    with pytest.raises(AssertionError, match="rows"):
        save_picture([noise(32, 8)], tmp_path / f"a{ending}", height=height, width=8, metadata=None)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("ending", [".png", ".tiff", ".jpg"])
def test_rows_are_used_up(tmp_path: Path, ending: str) -> None:
    """Ranks exchange stripes while they are asked for: nobody may be left waiting."""
    over = []

    def rows() -> Iterator[np.ndarray]:
        yield noise(16, 8)
        over.append(True)

    save_picture(rows(), tmp_path / f"a{ending}", height=16, width=8, metadata=None)
    assert over


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_text("old")

    def fail() -> None:
        with replacing(file) as partial:
            partial.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert os.listdir(tmp_path) == ["picture.png"]
    assert file.read_text() == "old"


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tiff"])
def test_pictures_say_that_they_are_srgb(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"a{ending}"
    save(file)
    with Image.open(file) as picture:
        if ending == ".png":
            assert picture.info["srgb"] == 0
        else:
            own = ImageCms.ImageCmsProfile(io.BytesIO(picture.info["icc_profile"]))
            assert "sRGB" in ImageCms.getProfileDescription(own)


@pytest.mark.parametrize("ending", [".png", ".webp", ".tiff"])
def test_transparency_is_put_back(tmp_path: Path, ending: str) -> None:
    """On the background the picture looks as it was drawn; where nothing shows through, it is as it was drawn."""
    file, background = tmp_path / f"a{ending}", (255, 128, 0)
    opacity = np.linspace(0, 255, 64).astype(np.uint8)[None].repeat(32, axis=0)
    share = opacity[..., None] / 255
    drawn = (share * (10, 200, 90) + (1 - share) * background).round().astype(np.uint8)
    alpha = Alpha(Image.fromarray(opacity), background)
    save_picture(split(drawn), file, height=32, width=64, metadata=METADATA, alpha=alpha)
    with Image.open(file) as picture:
        assert picture.mode == "RGBA"
        found = np.asarray(picture)
        shown = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture)
    assert np.array_equal(found[..., 3], opacity)
    lossy = 12 * (ending == ".webp")
    assert np.abs(np.asarray(shown)[..., :3].astype(int) - drawn).max() <= 1 + lossy
    visible = opacity > 100
    assert np.abs(found[visible][:, :3].astype(int) - (10, 200, 90)).max() <= 2 + lossy


def test_transparency_grows_with_the_picture(tmp_path: Path) -> None:
    half = np.zeros((8, 8), np.uint8)
    half[:, 4:] = 255
    drawn = noise(64, 64)
    alpha = Alpha(Image.fromarray(half), (0, 0, 0))
    save_picture([drawn], tmp_path / "a.png", height=64, width=64, metadata=None, alpha=alpha)
    found = np.asarray(Image.open(tmp_path / "a.png"))
    assert (found[:, :24] == 0).all()
    assert np.array_equal(found[:, 40:, :3], drawn[:, 40:]) and (found[:, 40:, 3] == 255).all()


@pytest.mark.parametrize("exists", [True, False])
def test_a_symlink_is_written_through(tmp_path: Path, exists: bool) -> None:
    (tmp_path / "elsewhere").mkdir()
    file, link = tmp_path / "elsewhere/real.png", tmp_path / "link.png"
    link.symlink_to("elsewhere/real.png")
    if exists:
        file.write_text("old")
    save(link)
    assert link.is_symlink()
    assert os.listdir(file.parent) == ["real.png"]
    with Image.open(file) as picture:
        assert picture.size == (32, 16)


def test_sigterm_while_writing_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import time, pathlib, numpy as np; from clear_dist.pictures import save_picture\n"
        "def rows():\n"
        " yield np.zeros((20, 5000, 3), np.uint8)\n"
        " print('writing', flush=True); time.sleep(60)\n"
        f"save_picture(rows(), pathlib.Path({str(tmp_path / 'a.png')!r}), height=40, width=5000, metadata=None)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    assert len(os.listdir(tmp_path)) == 1
    time.sleep(0.1)
    process.terminate()
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert os.listdir(tmp_path) == []


def test_checks_before_a_request_do_not_import_numpy() -> None:
    code = "import sys, clear_dist.pictures; assert not {'numpy', 'PIL', 'tifffile'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_numbers_appear_only_where_there_are_several() -> None:
    assert numbered(Path("a/b.png"), 0, 1) == Path("a/b.png")
    assert [numbered(Path("b.png"), index, 11).name for index in (0, 10)] == ["b-00.png", "b-10.png"]


def test_large_pictures_have_thumbnails_beside_them() -> None:
    assert files_of(Path("a/b.c.tiff"), height=4096, width=4096) == [Path("a/b.c.tiff")]
    assert files_of(Path("a/b.c.tiff"), height=16, width=4097) == [Path("a/b.c.tiff"), Path("a/b.c.thumbnail.jpg")]
