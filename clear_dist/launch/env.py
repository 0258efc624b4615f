"""This process's place among the ranks: the sole reader of the launcher's environment. Standard library only."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_FAILURES, _THREADS = "CLEAR_DIST_FAILURES", "CLEAR_DIST_THREADS"


@dataclass(frozen=True, kw_only=True)
class Place:
    """One rank among its peers; the defaults are a process that nobody launched."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    launcher: Literal["torchrun", "clear-dist"] | None = None
    failures: Path | None = None
    """Folder in which the ranks of this machine, and `clear-dist --nproc`, learn that one has failed."""
    threads: int | None = None
    """This rank's share of the cores; None: as OpenMP was told."""
    meeting: tuple[str, int] | None = None


def read(environment: Mapping[str, str] = os.environ) -> Place:
    """Raises ValueError where the launcher's variables make no sense."""
    if not launched_by_torchrun(environment):
        return Place()
    rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if rank >= world_size:
        raise ValueError(f"RANK must be less than WORLD_SIZE, got RANK={rank} WORLD_SIZE={world_size}")
    return Place(
        rank=rank,
        local_rank=_number(environment, "LOCAL_RANK", rank),
        world_size=world_size,
        local_world_size=_number(environment, "LOCAL_WORLD_SIZE", world_size),
        launcher="clear-dist" if _FAILURES in environment else "torchrun",
        failures=_failures_folder(environment),
        threads=_number(environment, _THREADS) if _THREADS in environment else None,
        meeting=(environment["MASTER_ADDR"], _number(environment, "MASTER_PORT")),
    )


def launched_by_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun, or a launcher that sets the same variables, started this process as a rank."""
    return all(name in environment for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def variables(*, rank: int, size: int, port: int, failures: Path, threads: int | None) -> dict[str, str]:
    """torchrun's variables for one of `size` ranks on this machine."""
    own = {} if threads is None else {_THREADS: str(threads)}
    return own | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        _FAILURES: str(failures),
    }


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environment.get(name, "" if default is None else str(default))
    if not (value.isascii() and value.isdigit()):
        raise ValueError(f"{name} must be a whole number of at least 0, got {value!r}; start the ranks with torchrun")
    return int(value)


def _failures_folder(environment: Mapping[str, str]) -> Path | None:
    if _FAILURES in environment:
        return Path(environment[_FAILURES])
    # torchrun's own folder for this attempt: <folder>/attempt_0/<local rank>/error.json
    error_file = environment.get("TORCHELASTIC_ERROR_FILE")
    return Path(error_file).parents[1] if error_file else None
