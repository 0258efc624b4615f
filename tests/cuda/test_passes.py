"""Numbers that pass through memory between products and attention, counted in FLUX's blocks on a null GPU."""

import json
from pathlib import Path

import pytest

from benchmarks.lib.counts import FLUX
from clear_dist.plan.timing import PASSES
from tests.cuda.null_gpu import NullGpus

SIDE = 1024
MOST = 25
"""Numbers per channel, token and block of the whole model; torch's own operations take four times as many."""


def test_few_numbers_pass_through_memory(null_gpus: NullGpus, tmp_path: Path) -> None:
    ended = null_gpus.run("-m", "tests.cuda.passes", tmp_path / "found", str(SIDE), folder=tmp_path)
    assert ended.status == 0, ended.err
    forms = json.loads((tmp_path / "found").read_text())
    blocks = FLUX.double_blocks, FLUX.single_blocks
    average = {
        name: sum(count * each for count, each in zip(blocks, found, strict=True)) / FLUX.layers
        for name, found in forms.items()
    }
    print(forms, average)
    assert average["torch"] > 4 * average["eager"], "the counter sees what torch does"
    assert average["eager"] <= MOST and average["compiled"] <= average["eager"]
    assert average["eager"] == pytest.approx(PASSES, rel=0.1)
