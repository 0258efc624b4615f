"""A user's first hour on GPUs, with a tiny FLUX.1-dev: all steps, and an archive that tells nobody's names."""

import gzip
import json
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.cuda.null_gpu import ROOT, Machine, NullGpus, environment
from tests.tiny import make_clear_weights, make_tiny_pipeline

TOKEN = "hf_aTokenThatIsNoOnes"
DRAWN = ("1024", "alone", "large")
NOT_DONE = {"verify": "failed", "suite": "failed"}
"""Numbers are checked there."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The official layout, in a folder whose name has a space."""
    folder, pipe = tmp_path / "my models" / "FLUX.1-dev", make_tiny_pipeline(head_dim=32)
    pipe.save_pretrained(folder)
    make_clear_weights(pipe.transformer, folder / "clear_local_4.safetensors")
    return folder


@pytest.mark.parametrize(
    "done", [pytest.param(["suite"], id="suite aside"), pytest.param([], id="all", marks=pytest.mark.full)]
)
def test_from_beginning_to_archive(done: list[str], model: Path, null_gpus: NullGpus, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = tmp_path / "results"
    results.mkdir()
    (results / "steps.tsv").write_text("".join(f"{name}\tdone\t0\t\n" for name in done))
    # The stubs belong to Python; a shell and its tools have no use for them.
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    given = environment(null_gpus.stubs, Machine(gpus=2))
    python.write_text(f'#!/bin/sh\nLD_PRELOAD={given.pop("LD_PRELOAD")} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    script = ROOT / "benchmarks" / "gpu" / "first_hour.sh"
    ended = subprocess.run(
        [script, "--small", "--minutes", "600", "--model", model, "--folder", results],
        cwd=tmp_path, env=os.environ | given | {"PATH": path, "HF_TOKEN": TOKEN}, capture_output=True, text=True,
    )  # fmt: skip
    said = ended.stdout + ended.stderr
    states = {line.split("\t")[0]: line.split("\t")[1] for line in (results / "steps.tsv").read_text().splitlines()}
    steps = ("ready", "verify", "weights", *DRAWN, "official", "table10", "table7", "suite")
    assert states == dict.fromkeys(steps, "done") | {name: NOT_DONE[name] for name in NOT_DONE.keys() - done}, said
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        read = {entry.name.removeprefix("results/"): archive.extractfile(entry).read() for entry in archive}
    assert read.keys() >= {f"{name}.{end}" for name in DRAWN for end in ("png", "report.json", "plan.json")}
    assert read.keys() >= {"official.json", "table7.json", "table10.csv", "verify.log", "plans.json", "nvidia-smi.txt"}
    (row,) = json.loads(read["official.json"])["rows"]
    assert row["official"]["seconds_per_step"] > 0 and row["ours"]["peak_bytes"] > 0
    assert [row["ranks"] for row in json.loads(read["plans.json"])["pictures"]] == [2, 1, 2]
    for name, content in read.items():
        plain = gzip.decompress(content) if name.endswith(".gz") else content
        for private in (str(tmp_path), str(ROOT), sys.prefix, TOKEN, f" {socket.gethostname()} "):
            assert private.encode() not in plain, name
