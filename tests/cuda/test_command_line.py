"""The command line with every backend and flag, on one null GPU and on two."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cuda.null_gpu import Machine, NullGpus

GENERATE = ["generate", "--model", "demo", "--device", "cuda"]


@dataclass(frozen=True)
class Run:
    name: str
    gpus: int
    flags: str
    transport: str = "nccl"


RUNS = (
    Run("triton", 2, "--nproc 2 --attention-backend triton"),
    Run("flex", 1, "--attention-backend flex"),
    Run("tiled, exact", 2, "--nproc 2 --attention-backend tiled --text-attention exact"),
    Run("masked, text sharded", 2, "--nproc 2 --attention-backend masked --text-tokens sharded"),
    Run("full, text sharded", 2, "--nproc 2 --window full --text-tokens sharded"),
    Run("stale", 2, "--nproc 2 --steps 4 --schedule stale --warmup-steps 1 --text-attention exact"),
    Run("stale, average", 3, "--nproc 3 --steps 4 --schedule stale --warmup-steps 1"),
    Run("shards", 2, "--nproc 2 --shard-weights --attention-backend tiled"),
    Run("offload, hoisted", 1, "--offload --hoist-modulation --attention-backend tiled"),
    Run("int8, hoisted", 2, "--nproc 2 --int8 --hoist-modulation --attention-backend tiled"),
    Run("float8", 1, "--float8 --attention-backend tiled"),
    Run("compiled", 1, "--compile --attention-backend tiled"),
    Run("compiled, float8", 1, "--compile --float8 --attention-backend tiled"),
    Run("one GPU for two", 1, "--nproc 2 --attention-backend tiled --text-attention exact", "host"),
    Run("one GPU for two, stale", 1, "--nproc 2 --steps 4 --schedule stale --warmup-steps 1", "host"),
    Run("one GPU for two, shards", 1, "--nproc 2 --shard-weights --attention-backend tiled", "host"),
    Run("cascade", 2, "--nproc 2 --res 512 --preview-every 1 --save-stages --attention-backend tiled"),
    Run("columns", 2, "--nproc 2 --res 512x256 --attention-backend tiled"),
    Run("guidance ranks", 2, "--nproc 2 --guidance-ranks 2 --steps 8 --attention-backend triton"),
    Run("profile", 2, "--nproc 2 --profile trace.json --attention-backend tiled"),
    Run("two pictures", 2, "--nproc 2 --num-images 2 --attention-backend tiled"),
    Run("float32", 2, "--nproc 2 --dtype float32 --attention-backend tiled"),
    Run("float16", 1, "--dtype float16 --attention-backend tiled"),
)


@pytest.mark.parametrize("case", RUNS, ids=lambda case: case.name)
def test_generate(case: Run, null_gpus: NullGpus, tmp_path: Path) -> None:
    flags = case.flags.split()
    if "--steps" not in flags:
        flags += ["--steps", "2"]
    ended = null_gpus.command(
        *GENERATE, *flags, "--output", "drawn.png", "--report", "report.json",
        machine=Machine(gpus=case.gpus), folder=tmp_path,
    )  # fmt: skip
    assert ended.status == 0, ended.err
    assert ended.out.startswith("output=drawn")
    assert [line for line in ended.err.splitlines() if not line.startswith("clear-dist: ")] == []
    settings = json.loads((tmp_path / "report.json").read_text())["settings"]
    assert settings["transport"] == case.transport


@pytest.mark.parametrize(("gpus", "transport"), [(2, "nccl"), (1, "host")])
def test_verify_checks_all_that_needs_no_numbers(
    gpus: int, transport: str, null_gpus: NullGpus, tmp_path: Path
) -> None:
    """Halos, attention and models differ from what is expected, since nothing is computed; nothing else goes wrong."""
    ended = null_gpus.command(
        "verify", "--nproc", "2", "--device", "cuda", "--json", "-", machine=Machine(gpus=gpus), folder=tmp_path
    )
    assert ended.status == 1, ended.err
    assert ended.out, ended.err
    found = json.loads(ended.out)
    assert transport in json.dumps(found)


def test_upscale(null_gpus: NullGpus, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (256, 192), "teal").save(tmp_path / "in.png")
    ended = null_gpus.command(
        "upscale", "in.png", "--model", "demo", "--device", "cuda", "--nproc", "2", "--res", "512x384",
        "--upscale-steps", "2", "--output", "out.png", folder=tmp_path,
    )  # fmt: skip
    assert ended.status == 0, ended.err
