"""FLUX's VAE on a null GPU: the kernels of its attention, and its memory beside the plan."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lib.planned import engine
from tests.cuda.null_gpu import Machine, NullGpus
from tests.plan.asked import flux_request

WITHIN = 0.03
"""Share of the planned memory."""
QUERIES, KEYS = 8192, 4096
"""Sides of a block of scores."""


@pytest.mark.parametrize("side", [4096, pytest.param(8192, marks=pytest.mark.full)])
def test_attention_goes_by_products_within_the_planned_memory(side: int, null_gpus: NullGpus, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    ended = null_gpus.run("-m", "tests.cuda.vae", file, str(side), machine=Machine(gpus=1), folder=tmp_path)
    assert ended.status == 0, ended.err
    found: dict[str, Any] = json.loads(file.read_text())
    positions = (side // 8) ** 2
    blocks = positions // QUERIES * (positions // KEYS)
    asked = flux_request(height=side, width=side, world_size=1, cascade=False)
    for name, run in found.items():
        kernels = run["kernels"]
        assert kernels["weigh_kernel"] == kernels["add_kernel"] == blocks
        assert not [kernel for kernel in kernels if "fmha" in kernel or "flash" in kernel]
        planned = engine().vae(asked, asked.parts[0][0], encode=name == "encode").peak
        assert run["peak"] + run["given"] == pytest.approx(planned, rel=WITHIN)
