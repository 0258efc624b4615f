"""The engine that answers plans: one process for all tests of a worker, which remembers its answers."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from clear_dist.plan import Engine


@dataclass(frozen=True)
class Lasting(Engine):
    def stop(self) -> None:
        """Others go on asking."""


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    started = Lasting()
    yield started
    Engine.stop(started)
