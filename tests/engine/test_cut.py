"""A cut chooses its attention backend by the image, alike on all ranks."""

from dataclasses import replace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from clear_dist.comm.group import Group
from clear_dist.engine.cut import largest_call
from clear_dist.engine.striped import require_striped
from clear_dist.geometry import cut_in_stripes, plan_halos, reach
from clear_dist.parallelize import parallelize
from tests.ranks import run_ranks
from tests.tiny import make_tiny_pipeline


@given(height=st.integers(1, 80), width=st.integers(1, 80), radius=st.integers(1, 100), data=st.data())
def test_no_call_of_any_rank_is_larger_than_what_a_backend_is_chosen_for(
    height: int, width: int, radius: int, data: st.DataObject
) -> None:
    stripes = cut_in_stripes(height, data.draw(st.integers(1, min(height, 9))))
    largest = largest_call((height, width), stripes, radius)
    assert largest["columns"] == width and largest["radius"] == radius
    for rank in range(len(stripes)):
        plan = plan_halos(stripes, rank, radius)
        assert largest["rows"] - 1 <= len(plan.own) <= min(largest["rows"], largest["key_rows"])
        for held in plan.halos:
            assert len(held) <= largest["key_rows"]
            assert len(reach(held, plan.own, radius)) <= largest["rows"]


def choices(group: Group) -> list[dict[str, int]]:
    """What is asked for while images of several sizes are drawn, some of them twice in a row."""
    pipe = make_tiny_pipeline()
    parallelize(pipe, group=group, window=4)
    striped = require_striped(pipe)
    choose, asked = striped.settings.choose_backend, []

    def noting(**sizes: int) -> Any:
        asked.append(sizes)
        return choose(**sizes)

    striped.settings = replace(striped.settings, choose_backend=noting)
    pipe.set_progress_bar_config(disable=True)
    for height, text_tokens in ((13, 9), (13, 9), (12, 9), (12, 7)):
        size = {"height": 16 * height, "width": 16 * 6, "max_sequence_length": text_tokens}
        pipe("a hill", **size, num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="latent")
    return asked


def test_ranks_choose_alike_and_anew_for_another_image() -> None:
    """13 rows of tokens on 3 ranks: 5, 4 and 4, and 3 rows of halo on either side."""
    first, *others = run_ranks(choices, 3)
    assert all(asked == first for asked in others)
    known = {"columns": 6, "radius": 4}
    assert first == [
        {"rows": 5, "key_rows": 11, "text": 9} | known,
        {"rows": 4, "key_rows": 10, "text": 9} | known,
        {"rows": 4, "key_rows": 10, "text": 7} | known,
    ]
