"""This process's place among the ranks: the sole reader of the launcher's environment. Standard library only."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple
from zlib import crc32

_THREADS, _ALONE = "CLEAR_DIST_THREADS", "CLEAR_DIST_ALONE"
_FIRST_PORT, _PORTS, _LAST_PORT = 20_000, 10_000, 65_535


@dataclass(frozen=True, kw_only=True)
class Place:
    """One rank among its peers; the defaults are a process that nobody launched."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    """Ranks of this machine; of those, the ones that see the same GPUs."""
    launcher: Literal["torchrun", "srun", "mpirun", "clear-dist"] | None = None
    failures: Path | None = None
    """torchrun's folder, in which the ranks of this machine learn that one has told what happened."""
    threads: int | None = None
    """This rank's share of the cores; None: as OpenMP was told."""
    meeting: tuple[str, int] | None = None
    hosts_meeting: bool = False
    """Whether this rank is who the others meet; under torchrun that is its agent."""


class _Step(NamedTuple):
    """Names of the variables in which a launcher tells each of its processes its place."""

    launcher: Literal["srun", "mpirun"]
    rank: str
    size: str
    local_rank: str
    local_size: str
    job: tuple[str, ...]


# mpirun may start its processes by srun, whose variables then count machines: it comes first, but for Cray's. Slurm has
# SLURM_NTASKS in batch shells and interactive allocations too, which have no second task: it is not asked.
_STEPS = (
    _Step("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
          "OMPI_COMM_WORLD_LOCAL_SIZE", ("PMIX_NAMESPACE",)),
    _Step("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", ("PMI_JOBID",)),
    _Step("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE",
          ("SLURM_JOB_ID", "SLURM_STEP_ID")),
    _Step("mpirun", "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE", ("PMI_JOBID",)),
    _Step("mpirun", "PMI_RANK", "PMI_SIZE", "PMI_RANK", "PMI_SIZE", ("PMI_JOBID",)),  # that knows one machine
)  # fmt: skip


def read(environment: Mapping[str, str] = os.environ) -> Place:
    """Raises ValueError where the launcher's variables make no sense."""
    if all(name in environment for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return _of_torchrun(environment)
    steps = _STEPS if environment.get(_ALONE, "0") in ("", "0") else ()
    step = next((each for each in steps if {each.rank, each.size, each.local_rank} <= environment.keys()), None)
    return Place() if step is None else _of_step(step, environment)


def read_for(nproc: int | None) -> Place:
    """Place of a command; with `--nproc` it starts its own ranks, whatever srun or mpirun tell it."""
    if nproc is not None:
        os.environ[_ALONE] = "1"
    return read()


def is_launched() -> bool:
    """Whether a launcher started this process as a rank; for one whose variables make no sense, False."""
    try:
        return read().launcher is not None
    except ValueError:
        return False


def variables(*, rank: int, size: int, port: int, threads: int | None) -> dict[str, str]:
    """torchrun's variables for one of `size` ranks on this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        _THREADS: "" if threads is None else str(threads),
    }


def _of_torchrun(environment: Mapping[str, str]) -> Place:
    rank, size = _rank_of("RANK", "WORLD_SIZE", environment)
    # torchrun's own folder for this attempt: <folder>/attempt_0/<local rank>/error.json
    error_file = environment.get("TORCHELASTIC_ERROR_FILE")
    return Place(
        rank=rank,
        local_rank=_number(environment, "LOCAL_RANK", rank),
        world_size=size,
        local_world_size=_number(environment, "LOCAL_WORLD_SIZE", size),
        launcher="clear-dist" if _THREADS in environment else "torchrun",
        failures=Path(error_file).parents[1] if error_file else None,
        threads=_number(environment, _THREADS) if environment.get(_THREADS) else None,
        meeting=(environment["MASTER_ADDR"], _port(environment)),
        hosts_meeting=rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
    )


def _of_step(step: _Step, environment: Mapping[str, str]) -> Place:
    rank, size = _rank_of(step.rank, step.size, environment)
    if size == 1:
        return Place()
    local_size = _local_size(step, environment, size)
    host = environment.get("MASTER_ADDR", "127.0.0.1" if local_size == size else _first_host(environment))
    job = ".".join(environment.get(name, "") for name in step.job)
    return Place(
        rank=rank,
        local_rank=_number(environment, step.local_rank),
        world_size=size,
        local_world_size=1 if "SLURM_GPUS_PER_TASK" in environment else local_size,
        launcher=step.launcher,
        meeting=(host, _port(environment, _FIRST_PORT + crc32(job.encode()) % _PORTS)),
        hosts_meeting=rank == 0,
    )


def _local_size(step: _Step, environment: Mapping[str, str], size: int) -> int:
    """SLURM writes 2(x3),1 for three machines of two tasks and one of one; SLURM_NODEID counts them."""
    text = environment.get(step.local_size, str(size))
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", text, re.ASCII)
    sizes = [int(tasks) for tasks, times in runs for _ in range(int(times or 1))]
    machine = _number(environment, "SLURM_NODEID", 0) if step.launcher == "srun" else 0
    return sizes[machine] if machine < len(sizes) else size


def _first_host(environment: Mapping[str, str]) -> str:
    """Where rank 0 is: the first of SLURM's node[01-04,07],other."""
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
    if not nodes:
        raise ValueError(
            "MASTER_ADDR must name the machine of rank 0 where ranks are on several, got none; nearest: mpirun -x "
            "MASTER_ADDR=HOST"
        )
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes).split(",")[0]


def _rank_of(name: str, size_name: str, environment: Mapping[str, str]) -> tuple[int, int]:
    rank, size = _number(environment, name), _number(environment, size_name)
    if rank >= size:
        raise ValueError(f"{name} must be less than {size_name}, got {name}={rank} {size_name}={size}")
    return rank, size


def _port(environment: Mapping[str, str], default: int | None = None) -> int:
    port = _number(environment, "MASTER_PORT", default)
    if port > _LAST_PORT:
        raise ValueError(f"MASTER_PORT must be at most {_LAST_PORT}, got {port}; nearest: {_LAST_PORT}")
    return port


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environment.get(name, "" if default is None else str(default))
    if not (value.isascii() and value.isdigit()):
        raise ValueError(f"{name} must be a whole number of at least 0, got {value!r}; start the ranks with torchrun")
    return int(value)
