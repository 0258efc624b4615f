import pytest
import torch

from clear_dist.observe import peaks


def test_peak_memory_sees_what_was_freed_since_the_reset() -> None:
    device = torch.device("cpu")
    big = torch.ones(200_000_000, dtype=torch.uint8)
    del big
    if not peaks.reset_peak_memory(device):
        pytest.skip("the system does not let us reset the high-water mark")
    low = peaks.peak_memory(device)
    middle = torch.ones(100_000_000, dtype=torch.uint8)
    del middle
    assert 80_000_000 < peaks.peak_memory(device) - low < 120_000_000
