"""UltraFlux's positions against its formula written apart, alone and in a transformer on stripes."""

from typing import Any
from unittest import mock

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.families.flux import positions, yarn
from clear_dist.families.flux.card import ROPE_AXES
from clear_dist.parallelize import parallelize
from tests.families.flux.test_positions import TEXT, Generation
from tests.oracle import DenseClearProcessor
from tests.ranks import run_ranks
from tests.test_parallelize import relative_error
from tests.tiny import make_tiny_pipeline
from tests.ultraflux import Positions, make_official, make_ultraflux

SIZES = ((5, 7), (70, 3), (4, 66), (67, 129))
RADIUS = 4


def ids_of(height: int, width: int) -> Tensor:
    """Of text, then of a picture in raster order."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3).float()
    return torch.cat([torch.zeros(TEXT, 3), image])


@pytest.mark.parametrize("size", [(64, 64), (64, 65), (128, 128), (96, 171), (257, 40), (512, 2)], ids=str)
def test_positions_are_those_of_its_formula(size: tuple[int, int]) -> None:
    ids = ids_of(*size)
    found, expected = yarn.cosines_and_sines(ids, ROPE_AXES, 10_000, size), Positions(ROPE_AXES)(ids)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=0)
    stock = torch.stack(FluxPosEmbed(theta=10_000, axes_dim=list(ROPE_AXES))(ids))
    assert torch.allclose(torch.stack(found), stock, atol=2e-6) == (max(size) <= 64)


def test_what_its_numbers_come_to() -> None:
    """By hand, at 128 tokens a side: the first pair turns 10 times in 64 tokens, and slow ones half as fast."""
    found = yarn.frequencies(56, 10_000, 128, torch.device("cpu"))
    assert found[0] == pytest.approx(64 / (2 * torch.pi * 10))
    slow = 64 / (2 * torch.pi * torch.tensor(64 * 10_000 ** (54 / 56) / (2 * torch.pi)).round()) / 2
    assert found[27] == pytest.approx(float(slow))


def forwards(group: Group, window: Any, text_tokens: str, most: int) -> list[list[Tensor]]:
    """Two steps of a generation of each size."""
    pipe = make_ultraflux()
    pipe.scheduler.set_timesteps(2 * len(SIZES), mu=1.0)
    handle = parallelize(pipe, window=window, group=group, text_attention="exact", text_tokens=text_tokens)
    with torch.no_grad(), mock.patch.object(positions, "MOST_REMEMBERED", most):
        found = [[pipe.transformer(**given)[0] for given in steps] for steps in map(steps_of, SIZES[:3])]
    handle.undo()
    assert type(pipe.transformer.pos_embed) is FluxPosEmbed
    return found


def steps_of(size: tuple[int, int]) -> list[dict[str, Any]]:
    generation = Generation(size[0], *size)
    generation.text_ids = torch.zeros(TEXT, 3)  # they have no part in how long an axis is
    return [generation.step(), generation.step()]


def expected(window: Any, size: tuple[int, int], transformer: Any) -> list[Tensor]:
    if window != "full":
        transformer.set_attn_processor(DenseClearProcessor(*size, window))
    with torch.no_grad():
        return [transformer(**given)[0] for given in steps_of(size)]


@pytest.mark.parametrize(
    ("size", "text_tokens", "most"), [(1, "auto", 8192), (2, "sharded", 8192), (3, "replicated", 8)]
)
@pytest.mark.parametrize("window", ["full", RADIUS])
def test_a_transformer_on_stripes_has_them(size: int, text_tokens: str, most: int, window: Any) -> None:
    exact = [expected(window, each, make_official().transformer) for each in SIZES[:3]]
    for found in run_ranks(forwards, size, window, text_tokens, most):
        for mine, theirs in zip(found, exact, strict=True):
            for one, other in zip(mine, theirs, strict=True):
                assert relative_error(one, other) < 1e-4
    stock = [expected(window, each, make_tiny_pipeline().transformer) for each in SIZES[:2]]
    errors = [relative_error(one[0], other[0]) for one, other in zip(exact, stock, strict=False)]
    assert errors[0] < 1e-4 < 1e-2 < errors[1], "beyond 64 tokens they are others than FLUX.1's"


def test_what_a_picture_s_positions_cannot_be_made_for_is_refused() -> None:
    pipe, (given, _) = make_ultraflux(), steps_of((5, 7))
    pipe.scheduler.set_timesteps(1, mu=1.0)
    handle = parallelize(pipe, window="full")
    residuals = {"controlnet_block_samples": [torch.zeros(1, 35, 32)]}
    references = {"img_ids": torch.cat([given["img_ids"], torch.ones(2, 3)]), "hidden_states": torch.zeros(1, 37, 64)}
    with torch.no_grad():
        for more in (residuals, references):
            with pytest.raises(
                ValueError, match="takes a picture alone on stripes; leave out ControlNets and references"
            ):
                pipe.transformer(**given | more)
        with (
            pipe.transformer.pos_embed.register_forward_pre_hook(lambda module, ids: ids),
            pytest.raises(ValueError, match="leave out hooks on the rotary embedding"),
        ):
            pipe.transformer(**given)
    handle.undo()
