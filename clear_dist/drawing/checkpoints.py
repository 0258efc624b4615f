"""Checkpoints of a picture on disk, for one rank: written under another name, then renamed; the one before stays.

    stage-2-step-0.safetensors    what stage 2 begins with: the picture of stage 1
    stage-2-step-10.safetensors   what its steps from 11 on begin with

A file is whole where its tensors have the sums that it tells, so that what a broken disk left is found.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clear_dist.launch.ends import say
from clear_dist.pictures import replacing

NAME = re.compile(r"stage-(\d+)-step-(\d+)\.safetensors")
KEPT = 2
"""Newest files of either kind that stay."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Contents of a checkpoint; none."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What else there is, in JSON's types."""


@dataclass(frozen=True, kw_only=True)
class Newest:
    """Where to go on; at the beginning."""

    stage: int = 0
    """From 0: so many are finished."""
    step: int = 0
    """Steps of it that have been taken."""
    begun: Saved = Saved()
    """What the stage began with, but for the first one."""
    running: Saved = Saved()
    """What its next step begins with, but for the first one."""


class CheckpointFolder:
    def __init__(self, path: Path, request: str) -> None:
        """`request` is a digest of what is drawn: checkpoints with another one are taken for damaged."""
        self.path = path
        self._request = request

    def write(self, stage: int, step: int, saved: Saved) -> None:
        """Write a checkpoint, and delete those that it makes superfluous; raises OSError or SafetensorError."""
        tensors = {name: x.detach().cpu().contiguous() for name, x in saved.tensors.items()}
        about = {"request": self._request, "sums": _sums(tensors), "notes": dict(saved.notes)}
        with replacing(self._file(stage, step)) as partial:
            save_file(tensors, partial, metadata={"clear-dist": json.dumps(about)})
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        for is_first in (True, False):
            of_kind = [place for place in self._places() if (place[1] == 0) == is_first]
            for place in of_kind[:-KEPT]:
                self._file(*place).unlink(missing_ok=True)

    def newest(self) -> Newest:
        """The newest checkpoint that is whole; tells of damaged ones."""
        for stage, step in reversed(self._places()):
            begun = self._read(stage, 0) if stage else Saved()
            running = self._read(stage, step) if step and begun is not None else Saved()
            if begun is not None and running is not None:
                return Newest(stage=stage, step=step, begun=begun, running=running)
        return Newest()

    def _places(self) -> list[tuple[int, int]]:
        """Stage, from 0, and step of each checkpoint, in their order."""
        names = (NAME.fullmatch(file.name) for file in self.path.iterdir())
        return sorted((int(name[1]) - 1, int(name[2])) for name in names if name is not None)

    def _file(self, stage: int, step: int) -> Path:
        return self.path / f"stage-{stage + 1}-step-{step}.safetensors"

    def _read(self, stage: int, step: int) -> Saved | None:
        """None, and a line, for a damaged one."""
        file = self._file(stage, step)
        try:
            with safe_open(file, "pt") as opened:
                about = json.loads((opened.metadata() or {})["clear-dist"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            if (about["request"], about["sums"]) == (self._request, _sums(tensors)):
                return Saved(tensors=tensors, notes=about["notes"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            pass
        say(f"warning: the checkpoint {file} is damaged; going on from the one before")
        return None


def _sums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: crc32(x.reshape(-1).view(torch.uint8).numpy().data) for name, x in tensors.items()}
