"""FLUX.2 klein 4B's architecture on null GPUs: launches and messages of a steady step, memory beside the plan."""

import json
from pathlib import Path
from typing import Any

import pytest

from clear_dist.families.flux2.card import KLEIN
from clear_dist.options import Options
from clear_dist.plan.engine import Engine
from clear_dist.plan.questions import Module, StepQuestion, WeightsQuestion
from tests.cuda.flux2 import TEXT
from tests.cuda.null_gpu import Machine, NullGpus

WITHIN = 0.03
"""Share of the planned memory."""
WINDOW: dict[str, Any] = {"window": 16, "attention_backend": "triton", "cuda_graphs": "off"}
CASES = {
    "one": (1, 1024, WINDOW, 433),
    "four": (4, 4096, WINDOW | {"text_attention": "exact"}, 639),
}
"""Ranks, side in pixels, options, and most launches of a step: what they are now."""


def planned(ranks: int, side: int, options: Options) -> int:
    about: dict[str, Any] = {
        "module": Module(kind="diffusers.Flux2Transformer2DModel", config=KLEIN.hub_models[0].configs["transformer"]),
        "dtype": "bfloat16",
        "device": "cuda",
        "ranks": ranks,
        "options": options,
    }
    size = {"height": side // 16, "width": side // 16}
    step = StepQuestion(
        transport="nccl", rank=ranks // 2, images=1, text_tokens=TEXT, passes=1, steps=1, down_factor=1,
        has_lora=False, **size, **about,
    )  # fmt: skip
    engine = Engine()
    return engine.ask(WeightsQuestion(**about)).held + sum(engine.ask(step).peak.values())


@pytest.mark.parametrize("name", CASES)
def test_a_step_takes_what_it_took_and_what_was_planned(name: str, null_gpus: NullGpus, tmp_path: Path) -> None:
    ranks, side, options, launches = CASES[name]
    runs = json.dumps({name: (side, options)})
    machine = Machine(gpus=ranks)
    ended = null_gpus.run("-m", "tests.cuda.flux2", tmp_path, str(ranks), runs, machine=machine, folder=tmp_path)
    assert ended.status == 0, ended.err
    found = json.loads((tmp_path / f"{name}.{ranks // 2}").read_text())
    print(found)
    step = found["step"]
    assert found["transport"] == "nccl" and found["retries"] == 0
    assert [each for each in ("stream_waits", "device_waits", "to_host", "allocations") if step[each]] == []
    assert step["launches"] <= launches
    assert found["allocated"] == pytest.approx(planned(ranks, side, Options(**options).settled(16)), rel=WITHIN)
