"""What gpu_suite.py gives its parts: where they run, how much time they have, and a file for what they find."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clear_dist.observe.report import write


@dataclass
class Journal:
    """Rows of figures: each is printed and in the file as soon as it is told, so that a time-out loses nothing."""

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
    """What a part needs to know."""

    device: torch.device
    small: bool
    """Toy sizes, on a CPU too."""
    backend: str
    compile: bool
    """Blocks, in steps and profile: ours and diffusers'."""
    folder: Path
    deadline: float
    """In seconds, as `time.time` counts them."""
    journal: Journal

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.time()

    @property
    def settings(self) -> dict[str, Any]:
        """Of `parallelize`, where time is measured."""
        return {"attention_backend": self.backend, "compile": self.compile}

    @property
    def dtype(self) -> torch.dtype:
        """Of what is timed."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
