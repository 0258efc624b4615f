"""`clear-dist upscale` before anything is loaded: many pictures, transparent ones, and what of them is not used."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clear_dist.families.cards import CARDS
from clear_dist.options import Refusal
from clear_dist.request.flags import UpscaleFlags
from clear_dist.request.pictures import load
from clear_dist.request.settle import settle
from tests.request.test_pictures import ALONE, checked, here, model, picture

__all__ = ["here", "model"]


def test_several_pictures_each_have_a_size_and_a_name(model: Path) -> None:
    Path("photos").mkdir()
    files = [picture(200, 120), picture(64, 64, "photos/b.jpg"), picture(128, 192, "photos/a.png")]
    Path("photos/a-upscaled.png").write_text("a result, made an hour ago")
    request, _, lines = settle(UpscaleFlags(model=str(model), images=["a fox", str(files[0]), "photos"]), ALONE, CARDS)
    assert [each.file.name for each in request.pictures] == ["in.png", "a.png", "b.jpg"]
    assert [each.target for each in request.pictures] == [(400, 240), (256, 384), (128, 128)]
    assert request.outputs == (Path("in-upscaled.png"), Path("a-upscaled.png"), Path("b-upscaled.png"))
    assert request.prompts == ("a fox",) * 3
    assert request.size == (256, 384)  # of the largest, which is what has to fit
    assert [request.alone(index).stages[-1].size for index in range(3)] == [(400, 240), (256, 384), (128, 128)]
    assert "pictures: 3, the largest 384x256" in lines
    assert "photos: 1 files or folders in it are left out: by their names no pictures, or results" in lines
    assert checked(model, *files, output=Path("x.webp")).outputs == tuple(Path(f"x-{each}.webp") for each in range(3))


def test_a_name_that_is_not_utf_8_is_a_file(model: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    assert checked(model, picture(64, 64, name), "a fox", output=Path("x.png")).pictures[0].file.name == name


def test_prompts_of_several_pictures_are_lines_of_a_file(model: Path) -> None:
    files, prompts = [picture(64, 64, "a.png"), picture(64, 64, "b.png")], Path("prompts.txt")
    prompts.write_text("a fox\n\ntwo dogs\n")
    assert checked(model, *files, prompts=prompts).prompts == ("a fox", "two dogs")
    with pytest.raises(Refusal, match="a prompt for each of 1 pictures, got 2; nearest: 1"):
        checked(model, files[0], prompts=prompts)
    with pytest.raises(Refusal, match="either a prompt or --prompts can be given"):
        checked(model, files[0], "a fox", prompts=prompts)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["in.png", "a", "fox"], "at most one prompt, got 'a', 'fox'; quote the prompt"),
        (["a fox"], "upscale takes files and at most one prompt, got 'a fox'"),
        (["in.png", "gone.jpg"], r"a file that can be read, got gone\.jpg .No such file"),
        (["in.png", "broken.png"], r"one that Pillow reads .*, got broken\.png"),
        (
            ["in.png", "in.png"],
            r"must be different files, got in-upscaled\.png twice; nearest: --output in-upscaled-new",
        ),
    ],
)
def test_words_that_are_neither_pictures_nor_one_prompt_are_refused(
    model: Path, words: list[str], message: str
) -> None:
    picture(64, 64)
    Path("broken.png").write_text("none")
    with pytest.raises(Refusal, match=message):
        checked(model, *words)


def test_every_picture_of_several_is_checked(model: Path) -> None:
    small, large = picture(64, 64, "small.png"), picture(256, 256, "large.png")
    with pytest.raises(Refusal, match=r"got 192 x 192 for one of 256 x 256 px, large\.png"):
        checked(model, small, large, res=192)
    with pytest.raises(Refusal, match="8 rows of tokens can be cut for 1 to 8 ranks, got 9"):
        checked(model, large, small, nproc=9)
    with pytest.raises(Refusal, match="--latents-out takes pictures of one size, got 128x128, 512x512"):
        checked(model, small, large, latents_out=Path("x.safetensors"))


def test_what_lies_below_transparent_parts_is_the_background(model: Path) -> None:
    values = np.full((64, 64, 4), (255, 0, 255, 0), np.uint8)
    values[16:48, 16:48] = (10, 20, 30, 255)
    Image.fromarray(values).save("in.png")
    request, _, lines = settle(UpscaleFlags(model=str(model), images=["in.png"], background="#ff8000"), ALONE, CARDS)
    image, alpha = load(request.pictures[0])
    expected = np.full((64, 64, 3), (255, 128, 0), np.uint8)
    expected[16:48, 16:48] = (10, 20, 30)
    assert np.array_equal(np.asarray(image), expected)
    assert alpha is not None and np.array_equal(np.asarray(alpha), values[..., 3])
    assert "in.png: its transparency is kept apart, and put back" in lines
    flags = UpscaleFlags(model=str(model), images=["in.png"], output=Path("x.jpg"))
    assert "in.png: its transparency is laid on --background: x.jpg has none" in settle(flags, ALONE, CARDS)[2]
    for colour in ("blau", "#ff800080"):
        with pytest.raises(Refusal, match=f"--background must be a colour, .* got '{colour}'; nearest: white"):
            checked(model, "in.png", background=colour)


def test_a_background_of_nothing_transparent_has_no_effect(model: Path) -> None:
    flags = UpscaleFlags(model=str(model), images=[str(picture(64, 64))], background="red")
    assert "warning: --background has no effect: nothing here is transparent" in settle(flags, ALONE, CARDS)[2]


def test_what_of_a_picture_is_not_used_is_said(model: Path) -> None:
    frames = [Image.new("L", (64, 64), grey) for grey in (0, 255)]
    frames[0].save("in.gif", save_all=True, append_images=frames[1:])
    lines = settle(UpscaleFlags(model=str(model), images=["in.gif"]), ALONE, CARDS)[2]
    assert "warning: in.gif: the first of its 2 frames is used" in lines
