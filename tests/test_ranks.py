"""The tool that the other tests stand on: results, tracebacks, deaths and hangs all come back, in time."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from clear_dist.comm.group import Group
from tests.ranks import RanksFailedError, run_ranks


def tell(group: Group, factor: int, *, plus: torch.Tensor) -> tuple[int, torch.Tensor, int]:
    return group.rank, factor * torch.full((2,), group.rank, dtype=torch.bfloat16) + plus, torch.get_num_threads()


def test_results_come_back_in_order_with_tensors() -> None:
    for rank, (told, tensor, threads) in enumerate(run_ranks(tell, 3, 10, plus=torch.ones(2, dtype=torch.bfloat16))):
        assert told == rank
        assert tensor.tolist() == [10 * rank + 1] * 2
        assert threads == 1


def raise_on_rank_1(group: Group) -> None:
    if group.rank == 1:
        raise KeyError("where it happened")


def test_a_traceback_comes_back() -> None:
    with pytest.raises(
        RanksFailedError, match=r"(?s)rank 1: Traceback.*in raise_on_rank_1.*KeyError: 'where it happened'"
    ):
        run_ranks(raise_on_rank_1, 2)


def exit_on_rank_0(group: Group) -> None:
    if group.rank == 0:
        os._exit(7)


def test_a_silent_death_is_told() -> None:
    with pytest.raises(RanksFailedError, match="rank 0: died with exit code 7"):
        run_ranks(exit_on_rank_0, 2)


def sleep_on_rank_1(group: Group) -> None:
    if group.rank == 1:
        time.sleep(60)


def test_a_hang_ends_in_time() -> None:
    run_ranks(raise_nothing, 2)  # start the server of ranks, which takes a while
    with pytest.raises(RanksFailedError, match="rank 1: hung"):
        run_ranks(sleep_on_rank_1, 2, timeout=2)


def raise_nothing(group: Group) -> None:
    group.barrier()


def test_limits_grow_by_one_variable() -> None:
    command = [sys.executable, "-m", "pytest", "-n0", "-v", "--collect-only", "tests/test_options.py"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_TIMEOUT"}
    done = subprocess.run(
        command, env=environment | {"TEST_PATIENCE": "3"}, cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert "timeout: 1800.0s" in done.stdout
