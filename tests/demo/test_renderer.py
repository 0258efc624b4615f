"""The renderer: what a caption says can be measured in the picture, at any size."""

import dataclasses

import numpy as np
import pytest

from clear_dist.demo.grammar import CHOICES, Landscape
from clear_dist.demo.renderer import render

WORDS = Landscape(time="noon", season="green", land="hills", body="sun", side="left", sky="clear", trees=None)


def draw(seed: int = 0, height: int = 96, width: int = 96, **words: str | None) -> np.ndarray:
    return render(dataclasses.replace(WORDS, **words), seed, height, width).astype(np.float32)


def brightness(picture: np.ndarray) -> float:
    return float(picture.mean())


@pytest.mark.parametrize("time", CHOICES["time"])
@pytest.mark.parametrize("land", CHOICES["land"])
def test_shape_and_repeatability(time, land):
    first, second = (draw(3, 64, 112, time=time, land=land, trees="pine", sky="cloudy") for _ in range(2))
    assert first.shape == (64, 112, 3)
    assert np.array_equal(first, second)


@pytest.mark.parametrize("seed", range(4))
def test_night_is_darkest_and_noon_brightest(seed):
    sunset, night, noon = (brightness(draw(seed, time=time)) for time in ("sunset", "night", "noon"))
    assert night < 0.7 * sunset < 0.7 * noon


@pytest.mark.parametrize(("side", "third"), [("left", 0), ("center", 1), ("right", 2)])
@pytest.mark.parametrize("body", CHOICES["body"])
@pytest.mark.parametrize("width", [96, 192])
def test_the_light_is_in_the_stated_third(side, third, body, width):
    upper = draw(1, 96, width, time="night", side=side, body=body)[:40].mean(axis=(0, 2))
    thirds = [part.mean() for part in np.array_split(upper, 3)]
    assert int(np.argmax(thirds)) == third


def test_seasons_colour_the_land():
    ground = {season: draw(2, season=season)[-20:].mean(axis=(0, 1)) for season in CHOICES["season"]}
    assert ground["green"].argmax() == 1
    assert ground["autumn"].argmax() == 0
    assert ground["snowy"].min() > max(ground["green"].min(), ground["desert"].min(), ground["autumn"].min())


def test_clouds_and_trees_are_drawn_where_they_belong():
    clear, cloudy, trees = draw(5), draw(5, sky="cloudy"), draw(5, trees="pine")
    assert np.abs(clear - cloudy)[:48].mean() > 3
    assert np.abs(clear - trees)[:24].mean() == 0
    assert trees[48:].mean() < clear[48:].mean()


@pytest.mark.parametrize("land", CHOICES["land"])
def test_a_scene_does_not_depend_on_the_resolution(land):
    small = draw(7, 64, 64, land=land, sky="cloudy", trees="pine")
    large = draw(7, 256, 256, land=land, sky="cloudy", trees="pine")
    shrunk = large.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - small).mean() < 4
