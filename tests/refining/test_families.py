"""I-Max, HiFlow and clipped NTK in other families, on two ranks against one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.drawing.given import from_image
from clear_dist.stages import Sampling, Stage, Upscaling
from tests.families.flux2.tiny import make_tiny_klein
from tests.families.z_image.tiny import make_tiny_z_image
from tests.ranks import run_ranks
from tests.refining.drawing import cascade_of, relative_error
from tests.refining.reference import NATIVE

MODELS: dict[str, Callable[..., Any]] = {"flux2": make_tiny_klein, "z_image": make_tiny_z_image}
CASES = (("imax", "plain"), ("imax", "clipped"), ("hiflow", "clipped"), ("sdedit", "plain"))
PICTURE = Image.fromarray(np.random.default_rng(5).integers(0, 256, (NATIVE, NATIVE, 3), dtype=np.uint8))
"""Above which all upper stages are drawn: bytes that ranks draw may differ by one."""


def drawn(group: Group, name: str) -> list[Tensor]:
    found = []
    for refinement, ntk in CASES:
        cascade, _ = cascade_of(MODELS[name](sample_size=NATIVE), group, window=3, text_attention="exact", text=40)
        how: dict[str, Any] = {"refinement": refinement, "ntk": ntk, "strength": 1.0, "guidance_scale": 0.0}
        first = Stage(height=NATIVE, width=NATIVE, sampling=Sampling(steps=2, guidance_scale=0.0))
        upper = Stage(height=112, width=96, sampling=Upscaling(steps=2, **how))
        lower = cascade.draw(first, keep=2 if refinement == "hiflow" else 0)
        latents = cascade.draw(upper, replace(from_image(PICTURE, group), kept=lower.kept)).latents
        assert latents is not None
        found.append(latents)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_are_one(name: str) -> None:
    (one,), two = run_ranks(drawn, 1, name), run_ranks(drawn, 2, name)
    for rank in two:
        for mine, alone in zip(rank, one, strict=True):
            assert relative_error(mine, alone) < 1e-4
    for index, each in enumerate(one):  # every way, and clipping, does something
        assert all(relative_error(each, other) > 1e-3 for other in one[:index])
