"""Axes that ranks are shared out along: what is refused before anything is loaded, and who draws which picture."""

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from clear_dist.families.cards import CARDS
from clear_dist.geometry import Rows
from clear_dist.launch.env import Place
from clear_dist.options import Refusal
from clear_dist.request.flags import GenerateFlags
from clear_dist.request.request import Request
from clear_dist.request.settle import settle


def settled(**given: Any) -> Request:
    return settle(GenerateFlags(device="cpu", model="demo", **given), Place(), CARDS)[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nproc": 4, "data_ranks": 3}, r"--data-ranks must divide the number of ranks, 4, got 3; nearest: 2"),
        ({"nproc": 2, "data_ranks": 4}, r"--data-ranks must divide the number of ranks, 2, got 4; nearest: 2"),
        ({"nproc": 4, "data_ranks": 2}, r"--data-ranks must be at most the number of pictures, 1, got 2; nearest: 1"),
        (
            {"nproc": 8, "data_ranks": 8, "num_images": 7},
            r"--data-ranks must be at most the number of pictures, 7, got 8; nearest: 4",
        ),
        ({"nproc": 3, "guidance_ranks": 2}, r"--guidance-ranks 2 needs an even number of ranks .* got 3; nearest: 1"),
        ({"guidance_ranks": 2}, r"--guidance-ranks 2 needs an even number of ranks .* got 1; nearest: 1"),
        (
            {"nproc": 2, "data_ranks": 2, "num_images": 2, "guidance_ranks": 2},
            r"--guidance-ranks 2 needs an even number of ranks for a picture, got 1; nearest: 1",
        ),
        (
            {"nproc": 2, "guidance_ranks": 2, "true_cfg_scale": 1.0},
            r"--guidance-ranks 2 needs classifier-free guidance, .* demo draws without here; nearest: --guidance-ranks 1",
        ),
        ({"guidance_ranks": 3}, r"--guidance-ranks must be one of auto, 1, 2, got '3'; nearest: auto"),
        ({"guidance_ranks": True}, r"--guidance-ranks must be one of auto, 1, 2, got 'True'"),
    ],
)
def test_wrong_axes_are_refused_on_one_line(
    given: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match=message) as raised:
        settled(**given)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("groups", range(1, 7))
@pytest.mark.parametrize(("prompts", "images"), [(6, 1), (1, 6), (3, 2), (2, 5)])
def test_groups_draw_each_picture_once_in_order(prompts: int, images: int, groups: int) -> None:
    request = replace(settled(), prompts=("a",) * prompts, num_images=images, world_size=60, data_ranks=groups)
    shares = [request.drawn_by(group) for group in range(groups)]
    drawn = [
        [(prompt, image) for prompt, rows in share.items() for image in range(rows.start, rows.stop)]
        for share in shares
    ]
    assert list(chain(*drawn)) == [(prompt, image) for prompt in range(prompts) for image in range(images)]
    assert max(map(len, drawn)) - min(map(len, drawn)) <= 1
    assert request.images_at_once == max(len(rows) for share in shares for rows in share.values())
    assert request.ranks == 60 // groups


def test_one_group_draws_all() -> None:
    assert replace(settled(), prompts=("a", "b"), num_images=3).drawn_by(0) == {0: Rows(0, 3), 1: Rows(0, 3)}
