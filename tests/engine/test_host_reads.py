"""Once a generation is under way, a forward gives the GPU its work and waits for nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from clear_dist.comm.group import Group
from clear_dist.parallelize import parallelize
from tests.host_reads import HostReads
from tests.ranks import run_ranks
from tests.test_parallelize import run
from tests.tiny import make_tiny_pipeline

EXACT: dict[str, Any] = {"window": 4, "text_attention": "exact"}
SETTINGS: list[dict[str, Any]] = [
    EXACT,
    {"window": 4},
    {"window": "full"},
    EXACT | {"schedule": "stale", "warmup_steps": 1},
    {"window": "full", "schedule": "stale", "warmup_steps": 1},
]


def reads(group: Group, settings: dict[str, Any]) -> list[dict[str, int]]:
    """Host reads of each forward, two a step."""
    forwards: list[HostReads] = []
    pipe = make_tiny_pipeline()

    def begin(*_: Any) -> None:
        forwards.append(HostReads().__enter__())

    # Around the engine's own hooks.
    pipe.transformer.register_forward_pre_hook(begin)
    handle = parallelize(pipe, group=group, **settings)
    pipe.transformer.register_forward_hook(lambda *_: forwards[-1].__exit__(None, None, None))
    with pytest.MonkeyPatch.context() as patch:
        # It compares host tensors through gloo, whatever the device: hosts wait for each other, none for a GPU.
        patch.setattr(Group, "start_equal", lambda self, values: lambda: True)
        run(pipe, negative_prompt="fog", true_cfg_scale=2.0, steps=3)
    handle.undo()
    return [dict(forward.found) for forward in forwards]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_no_step_but_the_first_reads_from_the_device(size: int, settings: dict[str, Any]) -> None:
    for first, _, *others in run_ranks(reads, size, settings):
        # The grid is read from ids, inputs are compared over ranks; room is asked for in each pass of the first step.
        assert first
        assert others == [{}] * 4


def test_hoisted_modulation_reads_once_a_forward_which_step_it_is() -> None:
    ((_, _, *others),) = run_ranks(reads, 1, EXACT | {"hoist_modulation": True})
    assert others == [{"torch.Tensor.tolist": 1}] * 4


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: int(x[0]),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: x.nonzero(),
        lambda x: torch.tensor([1.0]) + x,
    ],
)
def test_what_counts(read: Callable[[torch.Tensor], Any]) -> None:
    x = torch.randn(3)
    with HostReads() as reads:
        x.mul(2).sum()
    assert not reads.found
    with HostReads() as reads:
        read(x)
    assert sum(reads.found.values()) >= 1
