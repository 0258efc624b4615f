"""Checkpoints of a training: a folder for each, written under another name, then renamed; the one before goes after.

A folder has the result so far, a CLEAR file; the recipe; and of each rank its masters and the optimiser's state. A run
that ends in the middle of writing leaves the last whole one.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.launch.ends import Failure, describe
from clear_dist.options import Refusal
from clear_dist.request.distill import RECIPE, Recipe, checkpoints_in, newest_checkpoint, require_same, to_toml


class Checkpoints:
    """Those of one run, in its output folder."""

    def __init__(self, recipe: Recipe, group: Group) -> None:
        self._recipe, self._group = recipe, group

    @property
    def newest(self) -> Path | None:
        return newest_checkpoint(self._recipe.output)

    def read(self) -> dict[str, Any] | None:
        """This rank's state in the newest one; None without one.

        Raises a Refusal on all ranks where it is another recipe's, or one cannot read its file.
        """
        folder = self._group.broadcast_object(self.newest)
        if folder is None:
            return None
        require_same(self._recipe, folder)
        ranks = len(list(folder.glob("state.rank*.pt")))
        if ranks != self._group.size:
            raise Refusal(f"{folder} is one of {ranks} ranks, got {self._group.size}; nearest: --nproc {ranks}")
        state = why = None
        try:
            state = torch.load(folder / _state(self._group.rank), map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
            why = f"{folder / _state(self._group.rank)} is cut off or damaged ({describe(error).partition('.')[0]})"
        if told := next(filter(None, self._group.gather_objects(why)), None):
            *_, earlier = None, *checkpoints_in(self._recipe.output)[:-1]
            goes_on = "the run begins anew" if earlier is None else f"it goes on from {earlier}"
            raise Refusal(f"{told}; nearest: delete {folder}, and {goes_on}")
        return state

    def write(self, steps: int, state: Mapping[str, Any], result: Mapping[str, Tensor]) -> Path:
        """Called on all ranks; raises a Failure on all where one could not write, and leaves the former one."""
        folder = self._recipe.output / f"checkpoint-{steps}"
        part, former, last = folder.with_suffix(".part"), self.newest, last_good(self._recipe.output)
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
        return "the disk is full" if _is_full(error) else describe(error)
    return None


@contextmanager
def telling_full_disk(output: Path) -> Iterator[None]:
    """Context in which a full disk is a Failure; what is written under another name first stays as it was."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _is_full(error):
            raise
        raise Failure(f"the disk is full in {output}; what was written before stays, {last_good(output)}") from error


def last_good(output: Path) -> str:
    newest = newest_checkpoint(output)
    return "there is no checkpoint yet" if newest is None else f"the last good checkpoint is {newest}"


def _is_full(error: BaseException | None) -> bool:
    """safetensors tells it in words, torch as what came before."""
    if error is None:
        return False
    is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    return is_full or _is_full(error.__context__)
