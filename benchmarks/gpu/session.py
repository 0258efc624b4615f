"""The surroundings of a part of suite.py: device, time left, and a journal of figures."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clear_dist.observe.report import write


@dataclass
class Journal:
    """Rows of figures, each printed and saved at once, so that a time-out loses nothing."""

    file: Path
    head: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def tell(self, **row: Any) -> None:
        print("  ", *(f"{name}={shown(value)}" for name, value in row.items()), flush=True)
        self.rows.append(row)
        write({**self.head, "rows": self.rows}, self.file)


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Session:
    """Device, sizes and time of a part."""

    device: torch.device
    small: bool
    """Whether sizes are toy sizes, for a CPU too."""
    backend: str
    compile: bool
    """Whether blocks are compiled in steps and profile, ours and diffusers'."""
    folder: Path
    deadline: float
    """End of the part's time, in seconds of `time.time`."""
    journal: Journal

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.time()

    @property
    def settings(self) -> dict[str, Any]:
        """Options of `parallelize` where time is measured."""
        return {"attention_backend": self.backend, "compile": self.compile}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of timed tensors."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
