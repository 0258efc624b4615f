"""Amounts and waiting are kept apart by step."""

import time

import pytest
import torch

from clear_dist.comm.counters import Counters


def test_each_step_has_its_own_sums() -> None:
    def wait() -> None:
        with counters.waiting("comm: test", torch.device("cpu")):
            time.sleep(0.01)

    counters = Counters()
    counters.add("other_bytes", 5)
    counters.add("halo_bytes_sent", 1)
    wait()
    assert counters.as_dict()["other_bytes"] == []  # no step has begun yet
    counters.begin_step()
    assert counters.as_dict()["seconds_waiting"] == [0]
    counters.add("halo_bytes_sent", 2)
    wait()
    counters.pause()
    wait()
    counters.resume()
    wait()
    for _ in range(3):
        counters.begin_step()
    counters.add("join_bytes", 7)
    counters.pause()
    wait()
    found = counters.as_dict()
    assert found["halo_bytes_sent"] == [3, 0, 0, 0]
    assert found["other_bytes"] == [5, 0, 0, 0]
    assert found["join_bytes"] == [0, 0, 0, 7]
    assert found["text_bytes_reduced"] == found["halo_messages_sent"] == [0, 0, 0, 0]
    assert found["seconds_waiting"][0] >= 0.02
    assert found["seconds_waiting"][1:] == [0, 0, 0]
    assert counters.as_dict() == found


def test_an_unknown_amount_is_refused() -> None:
    with pytest.raises(AssertionError, match="bites"):
        Counters().add("bites", 1)
