"""Memory of a whole command on a null GPU, by torch's own allocator: what a plan says, in loading too."""

import json
from pathlib import Path

import pytest

from tests.cuda.null_gpu import Machine, NullGpus
from tests.stand_in import make_stand_in

GIB = 4.0
"""Memory of a card on which 8 bits fit, and the whole transformer, 4.5 GB, does not."""
CONTEXT = 600_000_000
"""What a plan takes CUDA to need, besides all that torch allocates."""
BESIDES = 50_000_000
"""Most bytes of what a plan leaves out of a model of tiny parts."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1-dev's true widths, 4 of its double blocks and 6 of its single ones, of zeros that take no room on disk."""
    return make_stand_in(tmp_path_factory.mktemp("few"), double_blocks=4, single_blocks=6, shards=2)


@pytest.mark.parametrize(
    "flags",
    [
        ("--int8",),
        ("--int8", "--hoist-modulation", "--offload"),
        *(pytest.param(each, marks=pytest.mark.full) for each in ((), ("--float8",), ("--hoist-modulation",))),
    ],
    ids="-".join,
)
def test_a_command_takes_what_is_planned(
    flags: tuple[str, ...], model: Path, null_gpus: NullGpus, tmp_path: Path
) -> None:
    """Most while loading and of all, as torch's allocator counts it, within 3 % of the plan."""
    given = ("--model", str(model), "--res", "512", "--clear-weights", "none", "--window", "8", *flags)
    report = tmp_path / "report.json"
    written = ("--output", str(tmp_path / "x.png"), "--report", str(report), "--steps", "2", "--device", "cuda")
    machine = Machine(gpus=1, gib=GIB if "--int8" in flags else 24, used_gib=0)
    drawn = null_gpus.command("generate", "x", "--nproc", "1", *given, *written, machine=machine, folder=tmp_path)
    assert drawn.status == 0, drawn.err
    told = json.loads(report.read_text())
    planned = null_gpus.command(
        "plan", "--gpu-memory", "24", "--nproc", "1", "--json", *given, machine=machine, folder=tmp_path
    )
    assert planned.status == 0, planned.err
    most = json.loads(planned.out)["memory"][0]["peak"] - CONTEXT
    peak = max(told["loading"]["peak_memory_bytes"][0], told["peak_memory_bytes"][0])
    assert peak == pytest.approx(most, rel=0.03, abs=BESIDES)
