"""Memory of a whole command on a null GPU, by torch's own allocator: what a plan says, in loading too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.stand_in import make_stand_in

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU, not even a null one")

GIB = 4.0
"""Of a card on which 8 bits fit, and the whole transformer, 4.5 GB, does not."""
CONTEXT = 600_000_000
"""What a plan takes CUDA to need, besides all that torch allocates."""
BESIDES = 50_000_000
"""Most bytes of what a plan leaves out of a model of tiny parts."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1-dev's true widths, 4 of its double blocks and 6 of its single ones, of zeros that take no room on disk."""
    return make_stand_in(tmp_path_factory.mktemp("few"), double_blocks=4, single_blocks=6, shards=2)


def command(*words: str) -> list[str]:
    return [sys.executable, "-P", "-m", "clear_dist", *words]


@pytest.mark.parametrize(
    "flags",
    [(), ("--int8",), ("--float8",), ("--hoist-modulation",), ("--int8", "--hoist-modulation", "--offload")],
    ids="-".join,
)
def test_a_command_takes_what_is_planned(flags: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    """Most while loading and of all, as torch's allocator counts it, within 3 % of the plan."""
    given = ("--model", str(model), "--res", "512", "--clear-weights", "none", "--window", "8", *flags)
    report = tmp_path / "report.json"
    written = ("--output", str(tmp_path / "x.png"), "--report", str(report), "--steps", "2", "--device", "cuda")
    drawn = subprocess.run(
        command("generate", "x", "--nproc", "1", *given, *written),
        env=os.environ | {"NULLCUDA_GIB": str(GIB if "--int8" in flags else 24)},
        capture_output=True,
        text=True,
    )
    assert drawn.returncode == 0, drawn.stderr
    told = json.loads(report.read_text())
    planned = subprocess.run(
        command("plan", "--gpu-memory", "24", "--nproc", "1", "--json", *given), capture_output=True, text=True
    )
    assert planned.returncode == 0, planned.stderr
    most = json.loads(planned.stdout)["memory"][0]["peak"] - CONTEXT
    peak = max(told["loading"]["peak_memory_bytes"][0], told["peak_memory_bytes"][0])
    assert peak == pytest.approx(most, rel=0.03, abs=BESIDES)
