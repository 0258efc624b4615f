"""Checkpoints of a training: a folder for each, written under another name, then renamed; the one before goes after.

A folder has the result so far, a CLEAR file; the recipe; and of each rank its masters and the optimiser's state. A run
that ends in the middle of writing leaves the last whole one.
"""

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.launch.ends import Failure
from clear_dist.options import Refusal
from clear_dist.request.distill import RECIPE, Recipe, newest_checkpoint, require_same, to_toml


class Checkpoints:
    """Those of one run, in its output folder."""

    def __init__(self, recipe: Recipe, group: Group) -> None:
        self._recipe, self._group = recipe, group

    @property
    def newest(self) -> Path | None:
        return newest_checkpoint(self._recipe.output)

    def read(self) -> dict[str, Any] | None:
        """This rank's state in the newest one; None without one. Raises a Refusal where it is another recipe's."""
        folder = self._group.broadcast_object(self.newest)
        if folder is None:
            return None
        require_same(self._recipe, folder)
        ranks = len(list(folder.glob("state.rank*.pt")))
        if ranks != self._group.size:
            raise Refusal(f"{folder} is one of {ranks} ranks, got {self._group.size}; nearest: --nproc {ranks}")
        return torch.load(folder / _state(self._group.rank), map_location="cpu", weights_only=True)

    def write(self, steps: int, state: Mapping[str, Any], result: Mapping[str, Tensor]) -> Path:
        """Called on all ranks; raises a Failure on all where one could not write, and leaves the former one."""
        folder = self._recipe.output / f"checkpoint-{steps}"
        part, former = folder.with_suffix(".part"), self.newest
        if self._group.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        self._group.barrier()
        writes: dict[str, Callable[[BinaryIO], Any]] = {_state(self._group.rank): lambda file: torch.save(state, file)}
        if self._group.rank == 0:
            writes[self._recipe.checkpoint_name] = lambda file: file.write(_saved(result))
            writes[RECIPE] = lambda file: file.write(to_toml(self._recipe).encode())
        errors = self._group.gather_objects(_written(part, writes))
        if told := next((error for error in errors if error is not None), None):
            shutil.rmtree(part, ignore_errors=True)
            last = "there is no checkpoint yet" if former is None else f"the last good checkpoint is {former}"
            raise Failure(f"{told} while {folder} was written; {last}")
        if self._group.rank == 0:
            if folder.exists():
                shutil.rmtree(folder)
            part.rename(folder)
            if former is not None and former != folder:
                shutil.rmtree(former)
        self._group.barrier()
        return folder

    def publish(self, folder: Path) -> Path:
        """The result of a checkpoint, beside it, with its recipe."""
        result = self._recipe.output / self._recipe.checkpoint_name
        if self._group.rank == 0:
            for source in (folder / RECIPE, folder / self._recipe.checkpoint_name):
                target = self._recipe.output / source.name
                shutil.copyfile(source, target.with_suffix(".part"))
                os.replace(target.with_suffix(".part"), target)
        self._group.barrier()
        return result


def _state(rank: int) -> str:
    return f"state.rank{rank}.pt"


def _saved(result: Mapping[str, Tensor]) -> bytes:
    return save(dict(result), metadata={"format": "pt"})


def _written(folder: Path, writes: Mapping[str, Callable[[BinaryIO], Any]]) -> str | None:
    """Why the files could not be written; None: they are."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, write in writes.items():
            with (folder / name).open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        return "the disk is full" if is_full else f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None
