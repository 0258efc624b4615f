"""`generate` above the native size and `upscale`, from the command to the files."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clear_dist.cli import main
from clear_dist.commands import saving
from clear_dist.pictures import save_picture
from tests.tiny import make_tiny_flux

QUICK = ("--seed", "5", "--device", "cpu", "--max_sequence_length", "16")
FEW = ("--upscale-steps", "2", "--strength", "0.6")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_flux(tmp_path_factory.mktemp("model"), sample_size=64)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(model: Path, *arguments: str) -> int:
    """Exit status, of a run in this process."""
    with pytest.raises(SystemExit) as ending:
        main([*arguments, "--model", str(model), *QUICK])
    return int(ending.value.code or 0)


def test_a_cascade_writes_stages_previews_and_a_report(
    model: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--save-stages", "--preview-every", "2", "--report", "r.json", "--steps", "3", "--num-images", "2", *FEW)
    assert run(model, "generate", "a fox", "--height", "256", "--width", "192", *flags) == 0
    report = json.loads(Path("r.json").read_text())
    sizes = [tuple(16 * side for side in stage["grid"]) for stage in report["stages"]]
    assert sizes[-1] == (256, 192)
    names = [
        f"clear-dist-{index}{middle}.png"
        for index in range(2)
        for middle in ("", *(f".{width}x{height}" for height, width in sizes[:-1]))
    ]
    assert sorted(os.listdir(here)) == sorted([*names, "clear-dist.preview.png", "r.json"])
    for height, width in sizes[:-1]:
        with Image.open(f"clear-dist-1.{width}x{height}.png") as picture:
            assert picture.size == (width, height)
    assert [len(stage["seconds_per_step"]) for stage in report["stages"]] == [3] + [2] * (len(sizes) - 1)
    assert len(report["seconds_per_step"]) == len(report["comm"][0]["halo_bytes_sent"]) == 3 + 2 * (len(sizes) - 1)
    assert capsys.readouterr().out.count("output=") == len(names)


def test_a_preview_is_the_picture_that_the_last_step_expects(model: Path, here: Path) -> None:
    """After the last step nothing is left to expect: the preview is the picture itself."""
    assert run(model, "generate", "a fox", "--res", "64", "--steps", "3", "--preview-every", "3") == 0
    with Image.open("clear-dist.png") as picture, Image.open("clear-dist.preview.png") as preview:
        difference = np.abs(np.asarray(picture, dtype=int) - np.asarray(preview, dtype=int))
    assert difference.max() <= 1


@pytest.mark.parametrize("size", [("16", "2048"), ("2048", "16")])
def test_long_thin_pictures_have_previews_too(model: Path, here: Path, size: tuple[str, str]) -> None:
    flags = ("--height", size[0], "--width", size[1], "--steps", "2", "--preview-every", "2")
    assert run(model, "generate", "a fox", *flags) == 0
    assert Path("clear-dist.preview.png").exists()


def test_a_preview_that_cannot_be_written_loses_nothing(
    model: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr("clear_dist.drawing.previews.replacing", fail)
    assert run(model, "generate", "a fox", "--res", "64", "--steps", "2", "--preview-every", "2") == 0
    assert capsys.readouterr().err.count("no preview: OSError: no room") == 1
    assert os.listdir(here) == ["clear-dist.png"]


def test_upscale_keeps_the_prompt_of_the_file(model: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "generate", "a fox", "--res", "64", "--steps", "2", "--output", "small.png") == 0
    assert run(model, "upscale", "small.png", *FEW) == 0
    with Image.open("small-upscaled.png") as picture:
        assert picture.size == (128, 128)
        assert picture.text["prompt"] == "a fox"  # type: ignore[attr-defined]
        settings = json.loads(picture.text["settings"])  # type: ignore[attr-defined]
        assert settings["upscaled_from"] == [64, 64]
        assert settings["model"] == model.name
        assert str(here) not in picture.text["settings"]  # type: ignore[attr-defined]
    assert (
        run(model, "upscale", "small.png", "two dogs", "--res", "192", "--output", "other.webp", "--no-metadata") == 0
    )
    with Image.open("other.webp") as picture:
        assert picture.size == (192, 192)
        assert not picture.getexif()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["output=small.png", "output=small-upscaled.png", "output=other.webp"]


def test_several_pictures_with_one_load(model: Path, here: Path) -> None:
    """Each as if it were alone: on two ranks, with its size, its prompt and its transparency."""
    values = np.random.default_rng(0).integers(0, 256, (64, 96, 4), np.uint8)
    Path("photos").mkdir()
    Image.fromarray(values).save("photos/a.png")
    Image.fromarray(values[:, :64, :3]).save("photos/b.png")
    Path("prompts.txt").write_text("a fox\ntwo dogs\n")
    assert run(model, "upscale", "photos", "--prompts", "prompts.txt", "--report", "r.json", "--nproc", "2", *FEW) == 0
    for name, prompt, size in (("a", "a fox", (192, 128)), ("b", "two dogs", (128, 128))):
        assert run(model, "upscale", f"photos/{name}.png", prompt, "--output", f"{name}-alone.png", *FEW) == 0
        with Image.open(f"{name}-upscaled.png") as picture, Image.open(f"{name}-alone.png") as alone:
            assert picture.text["prompt"] == prompt  # type: ignore[attr-defined]
            settings = json.loads(picture.text["settings"])  # type: ignore[attr-defined]
            assert (settings["width"], settings["height"]) == picture.size == size
            assert picture.mode == alone.mode == ("RGBA" if name == "a" else "RGB")
            white = Image.new("RGBA", picture.size, "white")
            shown = [np.asarray(Image.alpha_composite(white, each.convert("RGBA")), int) for each in (picture, alone)]
            assert np.abs(shown[0] - shown[1]).max() <= 2  # rounding, of drawing and of laying on white
    stages = json.loads(Path("r.json").read_text())["stages"]
    assert [stage["grid"] for stage in stages] == [[8, 12], [8, 8]]


def test_generate_starts_from_a_picture_and_keeps_what_a_mask_keeps(
    model: Path, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Lying on its side, and half transparent; in three stages, on two ranks, two prompts."""
    values = np.random.default_rng(4).integers(0, 256, (64, 96, 4), np.uint8)
    values[..., 3] = np.where(np.arange(96) < 48, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values).save("in.png", exif=exif)
    mask = np.zeros((96, 64), np.uint8)
    mask[:72] = 255
    Image.fromarray(mask).save("mask.png")
    Path("prompts.txt").write_text("a fox\ntwo dogs\n")
    flags = ("--prompts", "prompts.txt", "--steps", "4", "--strength", "0.5", "--width", "128", "--upscale-steps", "1")
    command = ("generate", "--image", "in.png", "--mask", "mask.png", *flags, "--nproc", "2", "--report", "r.json")
    assert run(model, *command) == 0
    report = json.loads(Path("r.json").read_text())
    assert [stage["grid"] for stage in report["stages"]] == [[5, 3], [8, 5], [12, 8]] * 2
    assert [len(stage["seconds_per_step"]) for stage in report["stages"]] == [2, 1, 1] * 2
    assert report["seconds"]["encode"] > 0
    upright = Image.fromarray(values).transpose(Image.Transpose.ROTATE_270)
    white = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
    own = np.asarray(white.resize((128, 192), Image.Resampling.BICUBIC), int)
    for index, prompt in enumerate(("a fox", "two dogs")):
        with Image.open(f"clear-dist-{index}.png") as picture:
            assert (picture.size, picture.mode) == ((128, 192), "RGBA")
            assert picture.text["prompt"] == prompt  # type: ignore[attr-defined]
            settings = json.loads(picture.text["settings"])  # type: ignore[attr-defined]
            assert (settings["drawn_from"], settings["mask"]) == ("in.png", "mask.png")
            assert (settings["sampling"]["strength"], settings["upscaling"]["strength"]) == (0.5, 0.7)
            shown = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
            error = np.abs(np.asarray(shown.convert("RGB"), int) - own)
        assert error[152:].max() <= 1 and error[104:136].max() > 30
    os.utime("mask.png", (later := Path("clear-dist-1.png").stat().st_mtime + 1, later))
    capfd.readouterr()
    assert run(model, *command, "--resume") == 0
    assert "skipped" not in capfd.readouterr().err


def test_of_a_list_what_is_there_is_left_out_and_what_fails_is_told(
    model: Path, here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture's disk fills up; the second run draws that picture, and the one whose original has changed."""
    for name in "abc":
        Image.new("RGB", (64, 64), "white").save(f"{name}.png")
    command = ("upscale", "a.png", "b.png", "c.png", "a fox", "--nproc", "2", *FEW)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_picture", full_disk_for("b-upscaled.png"))
        assert run(model, *command) == 3
    told = capfd.readouterr()
    assert "clear-dist: picture 2 of 3 failed: OSError: [Errno 28] No space left" in told.err
    assert told.err.splitlines()[-1] == "clear-dist: 1 of 3 pictures failed, as told above; the others are there"
    assert [line.split()[0] for line in told.out.splitlines()] == ["output=a-upscaled.png", "output=c-upscaled.png"]
    later = Path("c-upscaled.png").stat().st_mtime + 1
    os.utime("c.png", (later, later))
    assert run(model, *command, "--resume") == 0
    told = capfd.readouterr()
    assert "skipped: 1 of 3 pictures, which are there, drawn with the same settings" in told.err
    assert [line.split()[0] for line in told.out.splitlines()] == ["output=b-upscaled.png", "output=c-upscaled.png"]


def full_disk_for(name: str) -> Callable[..., list[Path]]:
    """`save_picture`, with a disk that fills up in the midst of one picture."""

    def save(rows: Iterator[np.ndarray], file: Path, **settings: Any) -> list[Path]:
        if file.name == name:
            next(rows)
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return save_picture(rows, file, **settings)

    return save


@pytest.mark.parametrize(("strength", "steps"), [("0.001", "1"), ("1", "2")])
def test_strength_says_how_much_of_the_picture_is_kept(model: Path, here: Path, strength: str, steps: str) -> None:
    """Almost none leaves what the VAE makes of it; all of it leaves nothing."""
    flat = [Image.new("RGB", (64, 64), color) for color in ("black", "white")]
    for index, image in enumerate(flat):
        image.save(f"{index}.png")
        flags = ("--res", "128", "--output", f"out{index}.png", "--strength", strength, "--upscale-steps", steps)
        assert run(model, "upscale", f"{index}.png", "x", *flags) == 0
    dark, light = (np.asarray(Image.open(f"out{index}.png"), dtype=int) for index in range(2))
    assert (np.abs(dark - light).max() == 0) == (strength == "1")
