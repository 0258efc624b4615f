"""README's script under torchrun, and the command line: which rank gets which GPU, and what is said of sharing."""

import json
import re
from pathlib import Path
from textwrap import dedent

import pytest

from tests.cuda.null_gpu import ROOT, Ended, Machine, NullGpus

REST = """
from tests.tiny import make_tiny_pipeline
pipe = make_tiny_pipeline().to(torch.bfloat16).to("cuda")
p = clear_dist.parallelize(pipe, window=4, text_attention="exact")
print(f"rank {p.group.rank} {p.group.device} {p.group.transport}\\n", end="")
p.undo()
"""
"""README's script after its first lines, with a small model; in one piece is written what ranks write at once."""
SHARED = "their messages go through host memory"


def beginning() -> str:
    """README's script up to the model, which would be downloaded."""
    first = "    import os, torch, clear_dist\n"
    _, found, rest = Path(ROOT, "README.md").read_text().partition(first)
    script, _, _ = rest.partition("    pipe = ")
    assert found and "set_device" in script
    return dedent(first + script)


def torchrun(gpus: NullGpus, script: str, folder: Path, machine: Machine) -> Ended:
    (folder / "script.py").write_text(script)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    return gpus.run(*launcher, "script.py", machine=machine, folder=folder)


@pytest.mark.parametrize("count", [2, 4])
def test_readmes_script_has_a_gpu_for_each_rank(null_gpus: NullGpus, tmp_path: Path, count: int) -> None:
    ended = torchrun(null_gpus, beginning() + REST, tmp_path, Machine(gpus=count))
    assert ended.status == 0, ended.err
    assert sorted(re.findall("rank .*", ended.out)) == ["rank 0 cuda:0 nccl", "rank 1 cuda:1 nccl"], ended
    assert SHARED not in ended.err


@pytest.mark.parametrize("count", [2, 4])
def test_all_ranks_on_one_gpu_are_refused(null_gpus: NullGpus, tmp_path: Path, count: int) -> None:
    ended = torchrun(null_gpus, "import torch, clear_dist" + REST, tmp_path, Machine(gpus=count))
    assert ended.status == 1
    told = f"Refusal: ranks must not share a GPU while others are idle, got ranks 0, 1 on GPU 0 of .*, and {count - 1} idle"
    assert len(re.findall(told, ended.err)) == 2, ended.err


def test_too_few_gpus_are_shared_and_that_is_told(null_gpus: NullGpus, tmp_path: Path) -> None:
    ended = torchrun(null_gpus, "import torch, clear_dist" + REST, tmp_path, Machine(gpus=1))
    assert ended.status == 0, ended.err
    assert sorted(re.findall("rank .*", ended.out)) == ["rank 0 cuda:0 host", "rank 1 cuda:0 host"]
    assert ended.err.count(SHARED) == 1


def test_the_command_line_tells_too(null_gpus: NullGpus, tmp_path: Path) -> None:
    flags = ("--model", "demo", "--steps", "1", "--res", "128", "--nproc", "2", "--report", "report.json")
    ended = null_gpus.command("generate", *flags, machine=Machine(gpus=1), folder=tmp_path)
    assert ended.status == 0, ended.err
    assert ended.err.count(SHARED) == 1
    assert json.loads((tmp_path / "report.json").read_text())["settings"]["transport"] == "host"
