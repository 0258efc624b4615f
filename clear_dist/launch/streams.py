"""Standard streams that can be told anything: what nobody hears, or cannot read, ends no work."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

ESCAPED = "backslashreplace"
"""What becomes of letters that an encoding lacks."""


class _Deaf(io.FileIO):
    """A file that takes what it cannot write: a disk is full, nobody reads a pipe, a terminal is gone."""

    def write(self, data: Any, /) -> Any:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def deaf(stream: TextIO) -> TextIO:
    """The same file, or what stands for it in a test, but writing to it never fails."""
    try:
        number = stream.fileno()
    except OSError:
        return stream
    raw = io.BufferedWriter(_Deaf(number, "w", closefd=False))
    return io.TextIOWrapper(raw, encoding=stream.encoding, errors=ESCAPED, line_buffering=True)


@contextmanager
def there() -> Iterator[None]:
    """Context in which all three files are open, and stderr, which only tells, is deaf."""
    for number in range(3):  # else the next files that are opened get these numbers, and what libraries print
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    out, errors = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(errors=ESCAPED)
    with redirect_stdout(out), redirect_stderr(deaf(errors)):
        yield
