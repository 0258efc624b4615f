"""`forked(function)`: a command of its own, but forked from a process that has imported what it would: seconds each."""

import atexit
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from signal import SIGKILL

from tests.ranks import server


class Forked:
    """What tests use of a `subprocess.Popen`; its process group is its own."""

    def __init__(self, process: BaseProcess, folder: "tempfile.TemporaryDirectory[str]") -> None:
        assert process.pid is not None
        self.pid = process.pid
        self.returncode: int | None = None
        self._process, self._folder = process, folder
        atexit.register(self._kill)  # a test may fail before the command ends, which would be waited for

    def said(self) -> str:
        """What it has written to stderr so far."""
        errors = Path(self._folder.name, "2")
        return errors.read_text() if errors.exists() else ""

    @property
    def has_ended(self) -> bool:
        return self._process.exitcode is not None

    def communicate(self) -> tuple[str, str]:
        """What it wrote to stdout and stderr, once it has ended."""
        self._process.join()
        self.returncode = self._process.exitcode
        atexit.unregister(self._kill)
        with self._folder as folder:
            return Path(folder, "1").read_text(), Path(folder, "2").read_text()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, SIGKILL)


def forked(function: Callable[[], object]) -> Forked:
    """Call `function`, which is pickled, in this process's folder; its exit status is the command's."""
    folder = tempfile.TemporaryDirectory()
    process = server().Process(target=_be_command, args=(function, Path.cwd(), Path(folder.name)))
    process.start()
    return Forked(process, folder)


def _be_command(function: Callable[[], object], here: Path, folder: Path) -> None:
    os.setsid()
    os.chdir(here)
    for stream in (1, 2):
        os.dup2(os.open(folder / str(stream), os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.pop("OMP_NUM_THREADS", None)  # ranks share the cores, as a user's do
    raise SystemExit(function())
