import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from clear_dist.pictures import EXIF_DESCRIPTION, numbered, replacing, save_picture

METADATA = {"prompt": "ein Fuß im Schnee", "seed": "7", "Software": "clear-dist 0", "settings": '{"steps": 2}'}


@pytest.mark.parametrize("ending", [".png", ".PNG", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"])
def test_pictures_carry_what_made_them(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"picture{ending}"
    save_picture(Image.new("RGB", (32, 16), "red"), file, METADATA)
    assert os.listdir(tmp_path) == [file.name]
    with Image.open(file) as picture:
        picture.load()
        assert picture.size == (32, 16)
        exif = picture.getexif()
        found = picture.text if ending.lower() == ".png" else json.loads(exif[EXIF_DESCRIPTION])  # type: ignore[attr-defined]
    assert found == METADATA


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tiff"])
@pytest.mark.parametrize("letter", ["a", "ß"])
def test_long_prompts_are_cut_where_they_do_not_fit(tmp_path: Path, ending: str, letter: str) -> None:
    file = tmp_path / f"picture{ending}"
    save_picture(Image.new("RGB", (32, 16)), file, METADATA | {"prompt": letter * 100_000})
    with Image.open(file) as picture:
        if ending == ".png":
            found = picture.text  # type: ignore[attr-defined]
            assert found["prompt"] == letter * 100_000
        else:
            found = json.loads(picture.getexif()[EXIF_DESCRIPTION])
            assert found["prompt"].startswith(letter * 5_000) and found["prompt"].endswith("...")
        assert found["settings"] == METADATA["settings"]


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    file = tmp_path / f"{'x' * 251}.png"
    save_picture(Image.new("RGB", (32, 16)), file, METADATA)
    assert os.listdir(tmp_path) == [file.name]


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


def test_sigterm_while_writing_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from clear_dist.pictures import replacing\n"
        f"with replacing(pathlib.Path({str(tmp_path / 'a.png')!r})) as partial:\n"
        " partial.write_text('half'); print('writing', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.1)
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM
    assert os.listdir(tmp_path) == []


def test_numbers_appear_only_where_there_are_several() -> None:
    assert numbered(Path("a/b.png"), 0, 1) == Path("a/b.png")
    assert [numbered(Path("b.png"), index, 11).name for index in (0, 10)] == ["b-00.png", "b-10.png"]
