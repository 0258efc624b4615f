"""A cut: its attention backend, chosen by the image alike on all ranks; what is cut, joined again."""

from dataclasses import replace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from clear_dist.attention import BACKENDS
from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.engine.cut import cut_image, joined_rows, joined_tokens, largest_call
from clear_dist.engine.settings import Settings
from clear_dist.engine.striped import require_striped
from clear_dist.geometry import Striping, cut_in_stripes, plan_halos, reach
from clear_dist.options import Options
from clear_dist.parallelize import parallelize
from tests.ranks import run_ranks
from tests.tiny import make_tiny_pipeline


@given(height=st.integers(1, 80), width=st.integers(1, 80), radius=st.integers(1, 100), data=st.data())
def test_no_call_of_any_rank_is_larger_than_what_a_backend_is_chosen_for(
    height: int, width: int, radius: int, data: st.DataObject
) -> None:
    stripes = cut_in_stripes(height, data.draw(st.integers(1, min(height, 9))))
    largest = largest_call(Striping(False, stripes, width), radius)
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
    known = {"columns": 6, "radius": 4, "square": False}
    assert first == [
        {"rows": 5, "key_rows": 11, "text": 9} | known,
        {"rows": 4, "key_rows": 10, "text": 9} | known,
        {"rows": 4, "key_rows": 10, "text": 7} | known,
    ]


def cut_and_joined(group: Group, height: int, width: int) -> list[str]:
    """Every token on one rank, in the order of its stripe, and all of them back; patches of 2 x 2 stay as they are."""
    stripes = []
    for cut in ("rows", "columns", "auto"):
        options = Options(window=3, cut=cut).settled(3)
        settings = Settings(options=options, choose_backend=lambda **sizes: BACKENDS["tiled"])
        how = {"text_tokens": 0, "clock": None, "counters": Counters()}
        made = cut_image((height, width), group, None, settings, **how)
        stripes.append("columns" if made.by_columns else "rows")
        own = range(made.plan.own.start, made.plan.own.stop)
        places = [(y, x) for y in own for x in range(width)] if not made.by_columns else []
        places = places or [(y, x) for x in own for y in range(height)]
        y, x = torch.tensor(places).T

        tokens = torch.randn(2, height * width + 3, 5, generator=torch.Generator().manual_seed(1))
        mine = made.own_tokens(tokens)
        assert torch.equal(mine, tokens[:, y * width + x])
        assert torch.equal(made.own_tokens(tokens[0], dim=0), mine[0])
        assert torch.equal(joined_tokens(mine.contiguous(), made), tokens[:, :-3])

        latents = torch.randn(2, 5, 2 * height, 2 * width, generator=torch.Generator().manual_seed(2))
        rows = made.own_patches(latents, 2)
        as_stripe = rows.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4).flatten(2, 3)
        as_image = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4)
        assert torch.equal(as_stripe, as_image[:, :, y, x])
        assert torch.equal(joined_rows(rows, made, 2), latents)
    return stripes


def test_tokens_and_patches_are_cut_and_joined_by_rows_and_by_columns() -> None:
    assert run_ranks(cut_and_joined, 3, 4, 7) == [["rows", "columns", "columns"]] * 3
    assert run_ranks(cut_and_joined, 1, 4, 7) == [["rows"] * 3]
