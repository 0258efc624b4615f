"""Tests on GPUs that are not there run where TEST_CUDA asks for them, which `.ci/run --cuda` does."""

import os
import shutil

import pytest
import torch
from filelock import FileLock

from tests.cuda.null_gpu import NullGpus, build

ASKED = os.environ.get("TEST_CUDA", "")
"""`quick`, `all`, or nothing."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in (each for each in items if "null_gpus" in getattr(each, "fixturenames", ())):
        if not ASKED:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA build of torch and half an hour: .ci/run --cuda"))
        elif ASKED == "quick" and item.get_closest_marker("full"):
            item.add_marker(pytest.mark.skip(reason="not among the quick ones: .ci/run --cuda-all"))


@pytest.fixture(scope="session")
def null_gpus(tmp_path_factory: pytest.TempPathFactory) -> NullGpus:
    """Stubs for the torch of this environment, and the kernels that all tests have compiled."""
    if torch.version.cuda is None:
        pytest.skip(f"torch {torch.__version__} is no CUDA build: .ci/run --cuda")
    assert shutil.which("gcc"), "the stubs of CUDA are built by gcc"
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    stubs = shared / "null_gpus"
    with FileLock(shared / "null_gpus.lock"):
        build(stubs)
    return NullGpus(stubs)
