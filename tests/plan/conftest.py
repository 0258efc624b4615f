"""The engine that answers plans, one process for all tests of a worker."""

from collections.abc import Iterator

import pytest

from clear_dist.plan import Engine


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    started = Engine()
    yield started
    started.stop()
