"""Labels for a profile: "comm: ..." what is sent and waited for, "compute: ..." what is computed meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.autograd import _profiler_enabled
from torch.profiler import record_function


@contextmanager
def labelled(label: str) -> Iterator[None]:
    """torch's record_function, around a block or a function, where a profiler runs; else it would cost for nothing."""
    if _profiler_enabled():
        with record_function(label):
            yield
    else:
        yield
