import time

import torch

from clear_dist.comm import in_touch
from clear_dist.comm.group import Group
from tests.patience import PATIENCE
from tests.ranks import run_ranks


def work_for_longer_than_the_timeout(group: Group) -> tuple[int, bool, float, float]:
    in_touch.SECONDS_BETWEEN_WORDS = 0.2  # this process is the rank's own
    impatient = Group.create("cpu", timeout_seconds=2 * PATIENCE)

    def work() -> tuple[int, bool, float]:
        time.sleep(3 * PATIENCE if group.rank == 1 else 0)
        return group.rank, torch.is_inference_mode_enabled(), time.monotonic()

    with torch.inference_mode(group.rank == 2):
        result = in_touch.in_touch(impatient, work)
    return *result, time.monotonic()


def test_each_gets_its_own_result_in_its_own_mode_once_all_are_done() -> None:
    results = run_ranks(work_for_longer_than_the_timeout, 3)
    assert [result[:2] for result in results] == [(0, False), (1, False), (2, True)]
    all_done = max(result[2] for result in results)
    assert all(result[3] >= all_done for result in results)
