"""What pictures of the demo show, as a network reads it: on renders that it has not seen, and on a drawn picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clear_dist.demo import DEFAULT_PROMPT
from clear_dist.demo.data import scene
from clear_dist.demo.grammar import caption, parsed
from clear_dist.evaluate.attributes import accuracy, read
from clear_dist.evaluate.teach import loss_of, scenes, spoilt, teach

UNSEEN = 5_000_000
"""First seed of scenes that are neither for training nor held out."""


@pytest.fixture(scope="module")
def rendered() -> tuple[torch.Tensor, list[str]]:
    words, pictures = zip(*(scene(UNSEEN + index, 128) for index in range(100)), strict=True)
    return torch.from_numpy(np.stack(pictures)), list(map(caption, words))


def test_renders_show_what_their_captions_say(rendered: tuple[torch.Tensor, list[str]]) -> None:
    found = accuracy(*rendered)
    assert found.keys() == {"time", "season", "land", "body", "side", "sky", "trees", "all"}
    assert found["all"] > 0.93 and min(found.values()) > 0.8, found


def test_captions_of_other_pictures_are_found_out(rendered: tuple[torch.Tensor, list[str]]) -> None:
    pictures, captions = rendered
    found = accuracy(pictures, captions[1:] + captions[:1])
    assert found["all"] < 0.6 and found["land"] < 0.5, found


def test_only_what_is_asked_for_counts(rendered: tuple[torch.Tensor, list[str]]) -> None:
    pictures, captions = rendered
    only = [f"{parsed(each)[0].time} with a lighthouse" for each in captions]
    assert accuracy(pictures, only).keys() == {"time", "all"}
    assert accuracy(pictures[:2], ["a lighthouse", ""]) == {}
    with pytest.raises(ValueError, match="zip"):
        accuracy(pictures, captions[:1])


def test_a_drawn_picture() -> None:
    picture = np.array(Image.open(Path(__file__).parents[2] / "docs" / "sunset.png").convert("RGB"))
    (shown,) = read(torch.from_numpy(picture)[None])
    asked = parsed(DEFAULT_PROMPT)[0]
    assert (shown.time, shown.body, shown.side, shown.sky, shown.trees) == (
        asked.time, asked.body, asked.side, asked.sky, asked.trees,
    )  # fmt: skip


def test_it_learns() -> None:
    pictures, indices = scenes(UNSEEN, 32)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for steps in (2, 40):
        reader = teach(pictures, indices, steps=steps)
        losses.append(loss_of(reader(spoilt(pictures, generator)), indices).item())
    assert losses[1] < 0.7 * losses[0]
