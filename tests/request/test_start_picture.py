"""`clear-dist generate --image` before anything is loaded: sizes, steps, masks, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clear_dist.families.cards import CARDS
from clear_dist.options import Refusal
from clear_dist.request.flags import GenerateFlags
from clear_dist.request.pictures import load_mask
from clear_dist.request.request import Request
from clear_dist.request.settle import settle
from clear_dist.stages import ImageToImage
from tests.request.test_pictures import ALONE, here, model, picture

__all__ = ["here", "model"]


def settled(model: Path | str, **given: Any) -> tuple[Request, tuple[str, ...]]:
    request, _, lines = settle(GenerateFlags(model=str(model), device="cpu", **given), ALONE, CARDS)
    return request, lines


def mask(height: int, width: int, white: slice, name: str = "mask.png") -> Path:
    values = np.zeros((height, width), np.uint8)
    values[:, white] = 255
    Image.fromarray(values).save(name)
    return Path(name)


def test_a_picture_is_drawn_at_the_native_size_in_its_shape(model: Path) -> None:
    request, lines = settled(model, image=picture(300, 200), prompt="a hill", steps=10)
    assert request.size == (144, 96) and request.picture is not None
    assert request.picture.box == (0, 0, 200, 300)
    (stage,) = request.stages
    assert isinstance(stage.sampling, ImageToImage) and stage.starts_from_picture
    assert (stage.sampling.steps, stage.sampling.schedule, stage.sampling.strength) == (6, 10, 0.6)
    assert "image: in.png, its middle 200x300 at 96x144: 6 of 10 steps at strength 0.6" in lines
    assert request.outputs == (Path("clear-dist.png"),)


def test_prompts_and_pictures_of_each_start_from_one(model: Path) -> None:
    Path("prompts.txt").write_text("a hill\na lake\n")
    request, _ = settled(model, image=picture(64, 64), prompts=Path("prompts.txt"), num_images=2, res=128)
    assert [each.file.name for each in request.pictures] == ["in.png"] * 2
    assert len(request.outputs) == 4
    assert request.alone(1).prompts == ("a lake",)
    assert request.alone(1).size == (128, 128)


def test_upper_stages_keep_their_own_strength(model: Path) -> None:
    request, _ = settled(model, image=picture(100, 300), prompt="a hill", res=256, strength=0.9, steps=10)
    assert request.picture is not None and request.picture.box == (100, 0, 200, 100)
    assert [stage.size for stage in request.stages] == [(128, 128), (256, 256)]
    assert [stage.sampling.steps for stage in request.stages] == [9, 7]
    assert [getattr(stage.sampling, "strength", None) for stage in request.stages] == [0.9, 0.7]
    assert settled(model, image=Path("in.png"), height=64)[0].size == (64, 192)


def test_a_mask_is_cropped_like_its_picture(model: Path) -> None:
    request, _ = settled(model, image=picture(100, 300), mask=mask(100, 300, slice(150, 300)), height=96, width=96)
    assert request.picture is not None
    found = load_mask(request.picture)
    assert found is not None and found.size == (100, 100)
    assert np.array_equal(np.asarray(found)[0], np.repeat(np.array([0, 255], np.uint8), 50))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask": "small.png"}, "--mask must be as large as --image, 80 x 64 px, got 40 x 64"),
        ({"mask": "black.png"}, "--mask must be white where .* got black.png, which is black"),
        ({"mask": "broken.png"}, r"one that Pillow reads .*, got broken\.png"),
        ({"image": "gone.png"}, r"a file that can be read, got gone\.png"),
        ({"image": None, "mask": "in.png"}, "--mask needs the picture that it is of, got in.png alone"),
        ({"image": None, "strength": 0.5}, "--strength is for a picture to start from, .* got 0.5 for 128 x 128 px"),
        ({"output": Path("in.png")}, "must be different files, got in.png twice"),
        ({"mask": "mask.png", "output": Path("mask.png")}, "must be different files, got mask.png twice"),
        ({"model": "someone/something"}, "--image needs --res for a model of unknown size, got someone/something"),
    ],
)
def test_what_cannot_be_drawn_is_refused(model: Path, given: dict[str, Any], message: str) -> None:
    picture(64, 80)
    mask(64, 40, slice(0, 9), "small.png")
    mask(64, 80, slice(0, 0), "black.png")
    mask(64, 80, slice(0, 9))
    Path("broken.png").write_text("no picture")
    names = {name: Path(given[name]) for name in ("image", "mask") if given.get(name)}
    with pytest.raises(Refusal, match=message) as refused:
        settled(**{"model": model, "image": Path("in.png"), **given, **names})
    assert "\n" not in str(refused.value)


def test_transparency_is_put_back(model: Path) -> None:
    Image.fromarray(np.full((64, 64, 4), 100, np.uint8)).save("clear.png")
    assert "clear.png: its transparency is kept apart, and put back" in settled(model, image=Path("clear.png"))[1]
    lines = settled(model, image=Path("clear.png"), output=Path("x.jpg"))[1]
    assert "clear.png: its transparency is laid on white: x.jpg has none" in lines
