"""Ranks that share GPUs: refused where others are idle, told of where not; what GPUs there are is made up."""

import warnings
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from clear_dist.comm import process_groups
from clear_dist.comm.group import Group
from clear_dist.comm.process_groups import RankGpu, check_sharing, device_of
from clear_dist.options import Refusal
from clear_dist.parallelize import parallelize
from tests.ranks import run_ranks
from tests.tiny import make_tiny_pipeline


def places(*numbers: int, gpus: int, host: str = "a", may_share: bool = False) -> list[RankGpu]:
    """Places of ranks on the GPUs of these numbers, of so many on a machine."""
    visible = tuple(f"GPU-{host}{number}" for number in range(gpus))
    return [RankGpu(host, visible[number], number, visible, may_share) for number in numbers]


ISOLATED = [RankGpu("a", f"GPU-a{number}", 0, (f"GPU-a{number}",), False) for number in (0, 1, 1)]
"""Each rank sees a GPU of its own only, as under srun."""


@pytest.mark.parametrize(
    "everyone",
    [
        places(0, 1, gpus=4),
        places(0, 1, 0, 1, gpus=2),
        places(0, 1, 2, 0, gpus=3),
        places(0, 0, gpus=1) + places(0, gpus=4, host="b"),
        places(0, 0, gpus=2, may_share=True),
        ISOLATED,
    ],
)
def test_ranks_may_share_where_none_is_idle(everyone: list[RankGpu]) -> None:
    check_sharing(everyone)


@pytest.mark.parametrize(
    ("everyone", "told"),
    [
        (places(0, 0, gpus=2), "ranks 0, 1 on GPU 0 of a, and 1 idle; nearest: a GPU for each"),
        (places(1, 2, 1, gpus=4), "ranks 0, 2 on GPU 1 of a, and 2 idle"),
        (places(0, 1, gpus=2) + places(0, 1, 1, gpus=4, host="b"), "ranks 3, 4 on GPU 1 of b, and 2 idle"),
        (places(0, gpus=2, may_share=True) + places(0, gpus=2), "ranks 0, 1 on GPU 0 of a, and 1 idle"),
        (
            [*ISOLATED, RankGpu("a", "GPU-a1", 1, ("GPU-a2", "GPU-a1"), False)],
            "ranks 1, 2, 3 on GPU 0 of a, and 1 idle",
        ),
    ],
)
def test_sharing_is_refused_where_others_are_idle(everyone: list[RankGpu], told: str) -> None:
    with pytest.raises(Refusal, match=f"^ranks must not share a GPU while others are idle, got {told}"):
        check_sharing(everyone)


def share(group: Group, may: tuple[bool, bool]) -> tuple[str, int, int]:
    """What is said where both ranks are on the first of two GPUs, and how many process groups stay of how many."""
    mine = places(0, gpus=2, may_share=may[group.rank])[0]
    before, told = len(dist.distributed_c10d._world.pg_map), []
    with (
        patch.object(process_groups, "choose_transport", return_value="host"),
        patch.object(process_groups, "place_of", return_value=mine),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        try:
            parallelize(make_tiny_pipeline(), window=4, text_attention="exact", share_gpus=may[group.rank]).undo()
        except ValueError as error:
            told = [str(error)]
    told += [str(each.message) for each in caught if "memory" in str(each.message)]
    return "; ".join(told), before, len(dist.distributed_c10d._world.pg_map)


@pytest.mark.parametrize("may", [(False, False), (True, False), (True, True)])
def test_all_ranks_refuse_alike_and_leave_nothing(may: tuple[bool, bool]) -> None:
    (first, *groups), (second, *others) = run_ranks(share, 2, may)
    assert groups[0] == groups[1] and others[0] == others[1]
    if all(may):
        assert "through host memory" in first and not second
    else:
        assert first == second
        assert first.startswith("ranks must not share a GPU while others are idle, got ranks 0, 1 on GPU 0 of a, and 1")
        assert first.endswith("or share_gpus")


def test_gpus_that_torch_cannot_use_are_refused_in_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12080).\nPlease update it")

    monkeypatch.setattr(torch.cuda, "init", fail)
    with pytest.raises(Refusal, match=r"got: The NVIDIA driver .* 12080\)\.; nearest: --device cpu$"):
        device_of("cuda", 0)
    assert device_of("cpu", 3) == torch.device("cpu")


OF_CUDA_12, OF_CUDA_13 = ["sm_75", "sm_86", "sm_90a"], ["sm_75", "sm_90", "sm_100", "compute_100"]


@pytest.mark.parametrize(
    ("built", "capability", "is_refused"),
    [
        (OF_CUDA_12, (7, 0), True),
        (OF_CUDA_12, (7, 5), False),
        (OF_CUDA_12, (8, 0), True),
        (OF_CUDA_12, (8, 9), False),
        (OF_CUDA_12, (12, 0), True),
        (OF_CUDA_13, (12, 0), False),
        (["gfx90a"], (9, 0), False),
        ([], (9, 0), False),
    ],
)
def test_gpus_that_torch_has_no_kernels_for_are_refused(
    monkeypatch: pytest.MonkeyPatch, built: list[str], capability: tuple[int, int], is_refused: bool
) -> None:
    made_up = {"init": None, "device_count": 2, "get_arch_list": built}
    for name, value in (made_up | {"get_device_capability": capability}).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    if is_refused:
        told = rf"\(sm_75 sm_86 sm_90a\), got compute capability {capability[0]}\.{capability[1]}; nearest: torch for"
        with pytest.raises(Refusal, match=told):
            device_of("cuda", 3)
    else:
        assert device_of("cuda", 3) == torch.device("cuda", 1)
