"""Text encoders and VAE in host memory: where their weights are, and that nothing comes out differently."""

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clear_dist.comm.group import Group
from clear_dist.drawing.generation import generate
from clear_dist.families.flux.card import CARD
from clear_dist.parallelize import parallelize
from clear_dist.weights.offload import FromHost, Offloaded, brought, offloaded_parts
from tests.ranks import run_ranks
from tests.test_parallelize import run
from tests.tiny import make_tiny_pipeline

PARTS = offloaded_parts(CARD.parts)
META = torch.device("meta")
"""Stands in for a GPU here: weights that are there are not on the host, and forwards run, without numbers."""


def devices(module: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in (*module.parameters(), *module.buffers())}


def addresses(module: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in module.parameters()]


def make_module() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()


@pytest.mark.parametrize("inference", [False, True])
def test_weights_come_for_the_forward_and_leave_after_it(inference: bool) -> None:
    with torch.inference_mode(inference):
        pipe: Any = type("Pipe", (), {"text_encoder": make_module(), "text_encoder_2": None})()
        module, seen = pipe.text_encoder, []
        before, values = addresses(module), [x.clone() for x in module.parameters()]
        offloaded = Offloaded(pipe, META, PARTS)
        module[0].register_forward_pre_hook(lambda *_: seen.append(devices(module)))
        for _ in range(2):
            assert devices(module) == {"cpu"}
            assert module(torch.empty(2, 3, device=META)).device == META
        assert seen == [{"meta"}] * 2
        assert addresses(module) == before, "those in host memory are kept, not made anew"
        assert all(torch.equal(x, y) for x, y in zip(module.parameters(), values, strict=True))
        offloaded.remove()
        assert devices(module) == {"meta"}
        assert not hasattr(module, "_hf_hook")


def test_what_is_used_by_other_ways_than_its_forward() -> None:
    module = make_module()
    with brought(module):
        assert devices(module) == {"cpu"}
    Offloaded(type("Pipe", (), {"vae": module})(), META, PARTS)
    with brought(module):
        assert devices(module) == {"meta"}
        with brought(module):  # diffusers' own call, mostly
            pass
    assert devices(module) == {"cpu"}
    with suppress(KeyboardInterrupt), brought(module):
        raise KeyboardInterrupt
    assert devices(module) == {"cpu"}


def test_shared_weights_stay_shared() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    Offloaded(type("Pipe", (), {"text_encoder": module})(), META, PARTS)
    with brought(module):
        assert devices(module) == {"meta"}
        assert module[1].weight is module[0].weight
    assert module[1].weight is module[0].weight


def pictures(group: Group, offload: bool) -> tuple[Any, Tensor, set[str]]:
    pipe = make_tiny_pipeline(sample_size=64)
    handle = parallelize(pipe, window=4, text_attention="exact", group=group, offload=offload)
    pipe.set_progress_bar_config(disable=True)
    images = generate(pipe, "a hill", height=96, width=80, num_inference_steps=2, max_sequence_length=9)
    hooked = {name for name in PARTS if isinstance(getattr(getattr(pipe, name), "_hf_hook", None), FromHost)}
    handle.undo()
    assert not any(hasattr(getattr(pipe, name), "_hf_hook") for name in PARTS)
    return [image.tobytes() for image in images], run(pipe, steps=1), hooked


def both_ways(group: Group) -> list[Any]:
    return [pictures(group, offload) for offload in (True, False)]


@pytest.mark.parametrize("size", [1, 3])
def test_pictures_are_the_same(size: int) -> None:
    """A cascade, so that the VAE encodes too."""
    for offloaded, stock in run_ranks(both_ways, size):
        assert offloaded[0] == stock[0]
        assert torch.equal(offloaded[1], stock[1])
        assert offloaded[2] == set(PARTS) and not stock[2]


def test_diffusers_own_offloading_is_named() -> None:
    pipe = make_tiny_pipeline()
    Offloaded(pipe, torch.device("cpu"), PARTS)
    with pytest.raises(ValueError, match="diffusers' own offloading exclude each other, got both for text_encoder"):
        parallelize(pipe, window=4, offload=True)
