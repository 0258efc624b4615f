"""A GPU that is too small, or taken by others: told before loading where it can be known, in one line where not."""

from pathlib import Path

import pytest

from tests.cuda.null_gpu import Machine, NullGpus

GENERATE = ["generate", "--model", "demo", "--device", "cuda", "--nproc", "2", "--steps", "2"]


@pytest.mark.parametrize("machine", [Machine(gib=0.62), Machine(used_gib=79.0)], ids=["small", "in use"])
def test_what_is_known_before_is_refused(machine: Machine, null_gpus: NullGpus, tmp_path: Path) -> None:
    ended = null_gpus.command(*GENERATE, machine=machine, folder=tmp_path)
    assert ended.status == 2
    assert "rank 0 must fit in the 0.1 GB that are free on GPU 0, got 1.0 GB" in ended.last_line


def test_what_is_taken_later_ends_with_advice(null_gpus: NullGpus, tmp_path: Path) -> None:
    """A program takes it that started after the check."""
    ended = null_gpus.command(*GENERATE, machine=Machine(unseen_gib=78.52), folder=tmp_path)
    assert ended.status == 1
    assert "out of memory" in ended.last_line and "clear-dist plan" in ended.last_line
