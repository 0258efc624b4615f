"""What a user sees where NCCL fails, on one rank or on all: the cause, in one line, and no hang."""

from pathlib import Path

import pytest

from tests.cuda.null_gpu import Ended, Machine, NullGpus

GENERATE = ["generate", "--model", "demo", "--device", "cuda", "--steps", "2", "--attention-backend", "tiled"]
SHM, REMOTE = (
    "Error while creating shared memory segment /dev/shm/nccl-XXXX",
    "socketProgress: Connection closed by remote",
)


def draw(null_gpus: NullGpus, folder: Path, failure: str, *launcher: str) -> Ended:
    words = (*launcher, "-m", "clear_dist", *GENERATE) if launcher else ("-m", "clear_dist", *GENERATE, "--nproc", "2")
    return null_gpus.run(*words, machine=Machine(gpus=2, failure=failure), folder=folder)


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        ("memory@1", "rank 1 failed: NcclError: Cuda failure 2 'out of memory'; no memory of the GPU is left for NCCL: "),
        ("shm@1", f"rank 1 failed: NcclError: {SHM} (size 9637888), error: No space left on device (28); /dev/shm is"),
        ("unknown@1", "rank 1 failed: NcclError: Proxy Call to rank 1 failed (Connect); NCCL_DEBUG=WARN shows what failed"),
        ("route@0", "rank 0 failed: ConnectionError: cannot connect to the other ranks: socketStartConnect: Connect to"),
        ("remote@0", f"rank 0 lost contact with another rank: a neighbour is gone: {REMOTE}"),
        ("closed@0,shm@1", f"rank 1 failed: NcclError: {SHM}"),
        ("remote@0,memory@1", "rank 1 failed: NcclError: Cuda failure 2 'out of memory'"),
        ("later@0", "rank 0 was killed by SIGABRT (what a library said stands above; NCCL's watchdog: another rank"),
    ],
)  # fmt: skip
def test_the_rank_that_knows_the_cause_tells_it(failure: str, line: str, null_gpus: NullGpus, tmp_path: Path) -> None:
    ended = draw(null_gpus, tmp_path, failure)
    told = [said for said in ended.err.splitlines() if said.startswith("clear-dist: ")]
    assert ended.status == 1, ended.err
    assert told[-1].startswith(f"clear-dist: {line}"), ended.err
    assert not list(tmp_path.iterdir())


def test_under_torchrun_too(null_gpus: NullGpus, tmp_path: Path) -> None:
    ended = draw(
        null_gpus, tmp_path, "closed@0,shm@1", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"
    )
    told = [line for line in ended.err.splitlines() if line.startswith("clear-dist: rank ")]
    assert (ended.status, len(told)) == (1, 1), ended.err
    assert f"failed: NcclError: {SHM}" in told[0]
