"""A server of a tiny random FLUX, as a user starts it, and OpenAI's client, as it is."""

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Protocol

from openai import OpenAI

from clear_dist.cli import main
from tests.forked import forked
from tests.patience import PATIENCE
from tests.tiny import make_tiny_flux

LIMITS = ("--max-side", "128", "--max-steps", "500", "--max-queue", "4")
SECONDS_TO_START = 240 * PATIENCE


class Process(Protocol):
    pid: int
    returncode: int | None

    def said(self) -> str: ...

    @property
    def has_ended(self) -> bool: ...

    def communicate(self) -> tuple[str, str]: ...


class Live:
    """A server that answers."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.url = self._found(r"listening at (\S+)")
        self._found(r"clear-dist: (ready)\n")

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120 * PATIENCE)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int | None:
        """Its exit status, once asked to end."""
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, number)
            self.process.communicate()
        return self.process.returncode

    def _found(self, pattern: str) -> str:
        deadline = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < deadline and not self.process.has_ended:
            if found := re.search(pattern, self.process.said()):
                return found[1]
            time.sleep(0.1)
        raise AssertionError(f"no {pattern!r} in: {self.process.said()}")


def arguments(model: Path, folder: Path, *flags: str) -> list[str]:
    fixed = ("--device", "cpu", "--port", "0", "--results", str(folder / "results"), "--max-seconds", "600")
    return ["serve", "--model", str(model), *fixed, *LIMITS, *flags]


@contextmanager
def living(model: Path, folder: Path, *flags: str) -> Iterator[Live]:
    """A server in a process of its own, ended afterwards."""
    server = Live(forked(partial(main, arguments(model, folder, *flags))))
    try:
        yield server
    finally:
        server.end()


def tiny_model(folder: Path) -> Path:
    return make_tiny_flux(folder)
