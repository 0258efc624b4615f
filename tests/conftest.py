"""What all tests share."""

import os
import signal
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.patience import SECONDS_PER_TEST

# A run that was started in the background ignores Ctrl-C, and commands under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Before torch is imported, here and in all that is started: tests run beside each other, and threads that wait spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTEST_TIMEOUT", str(SECONDS_PER_TEST))
# Kernels are compiled here; what Triton interprets, `tests/attention/test_triton.py` starts.
os.environ.pop("TRITON_INTERPRET", None)
# No example has to be quick: a busy machine is no fault.
settings.register_profile("unhurried", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture(scope="module", autouse=True)
def _ends_process_groups() -> Iterator[None]:
    """A command that fails in this process leaves its group open, as a rank that exits may."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
