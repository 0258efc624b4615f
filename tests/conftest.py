"""What all tests share."""

import signal
import sys
from collections.abc import Iterator

import pytest

# A run that was started in the background ignores Ctrl-C, and commands under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def _ends_process_groups() -> Iterator[None]:
    """A command that fails in this process leaves its group open, as a rank that exits may."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
