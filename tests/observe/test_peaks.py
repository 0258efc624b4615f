import subprocess
import sys

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


REUSED = """
import ctypes, resource, sys, torch
from clear_dist.observe.peaks import keep_for_the_next_layer

if sys.argv[1] == "kept":
    keep_for_the_next_layer(torch.device('cpu'))
else:  # glibc's first threshold, which it may raise as it likes
    M_MMAP_THRESHOLD = -3
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 * 1024)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    layer = [torch.zeros(24 * 2**20, dtype=torch.uint8) for _ in range(3)]
    del layer
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's memory")
def test_a_layers_memory_is_kept_for_the_next_one() -> None:
    """72 MB a layer, 20 layers: bytes of pages that the system had to give."""
    given = {
        how: int(subprocess.run([sys.executable, "-c", REUSED, how], check=True, capture_output=True).stdout)
        for how in ("kept", "trimmed")
    }
    assert given["kept"] < 5 * 72 * 2**20 < given["trimmed"]
