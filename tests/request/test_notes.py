from pathlib import Path
from typing import Any

import pytest
import torch

from clear_dist.demo import DEFAULT_PROMPT
from clear_dist.families.cards import CARDS
from clear_dist.launch.env import Place
from clear_dist.request.flags import GenerateFlags
from clear_dist.request.settle import settle
from tests.stand_in import make_stand_in
from tests.tiny import make_tiny_flux


def warnings(folder: Path, **flags: object) -> list[str]:
    config = GenerateFlags(model=str(folder), device="cpu", res=1024, **flags)  # type: ignore[arg-type]
    return [line for line in settle(config, Place(), CARDS)[2] if "casts" in line]


def test_ranks_that_cannot_share_the_weights_are_warned_of(tmp_path: Path) -> None:
    folder = make_stand_in(tmp_path, shards=2)
    # One block of each kind and what is around them: 545,548,096 parameters of 4 bytes.
    assert warnings(folder, nproc=4) == [
        "warning: each of 4 ranks casts the weights to float32, 2.2 GB of its own; "
        "with --dtype bfloat16 they share one copy"
    ]
    assert warnings(folder, nproc=4, dtype="bfloat16") == []
    assert warnings(folder, nproc=1) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_stored_as_it_is_used_is_shared(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = make_stand_in(tmp_path, dtype=dtype)
    assert warnings(folder, nproc=2, dtype=str(dtype).removeprefix("torch.")) == []
    assert len(warnings(folder, nproc=2, dtype="bfloat16")) == 1


def test_small_models_are_not_worth_a_word(tmp_path: Path) -> None:
    assert warnings(make_tiny_flux(tmp_path), nproc=4, dtype="bfloat16") == []


AVERAGE = (
    "text attention: average (the paper's Eq. 7): 2 ranks draw another picture than one, and may lose small things; "
    "--text-attention exact draws the same"
)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"nproc": 2}, [f"prompt: {DEFAULT_PROMPT!r} (none was given)", AVERAGE]),
        ({"nproc": 2, "text_attention": "average", "prompt": "sunset"}, [AVERAGE]),
        ({"nproc": 2, "text_attention": "exact", "prompt": "sunset"}, []),
        ({"nproc": 2, "window": "full", "prompt": "sunset"}, []),
        ({"nproc": 1, "prompt": "sunset"}, []),
    ],
)
def test_what_is_drawn_unasked_is_said(flags: dict[str, Any], told: list[str]) -> None:
    lines = settle(GenerateFlags(model="demo", device="cpu", **flags), Place(), CARDS)[2]
    assert [line for line in lines if not line.startswith("warning: ")] == told
