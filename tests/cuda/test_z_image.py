"""Z-Image's true size on null GPUs: waits of a steady step, memory beside the plan."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lib.planned import engine
from clear_dist.families.cards import CARDS
from clear_dist.options import Options
from clear_dist.plan.questions import Module, StepQuestion, WeightsQuestion
from tests.cuda.null_gpu import Machine, NullGpus
from tests.cuda.z_image import TEXT

WITHIN = 0.03
"""Share of the planned memory."""
WINDOW = {"window": 16, "attention_backend": "triton", "cuda_graphs": "off"}
CASES = [
    ("z-image", 1, 64, WINDOW),
    ("z-image", 4, 256, WINDOW | {"text_attention": "exact"}),
    pytest.param("z-image", 2, 63, WINDOW, marks=pytest.mark.full),  # with padding of the image
    pytest.param("z-image", 2, 128, {"window": "full", "cuda_graphs": "off"}, marks=pytest.mark.full),
    pytest.param("z-image", 1, 64, WINDOW | {"cuda_graphs": "auto"}, marks=pytest.mark.full),
]
NOT_IN_A_STEP = ("stream_waits", "device_waits", "to_host")


@pytest.mark.parametrize(("model", "ranks", "side", "options"), CASES)
def test_a_step_takes_what_was_planned(
    model: str, ranks: int, side: int, options: dict[str, Any], null_gpus: NullGpus, tmp_path: Path
) -> None:
    arguments = tmp_path, model, str(ranks), str(side), json.dumps(options)
    ended = null_gpus.run("-m", "tests.cuda.z_image", *arguments, machine=Machine(gpus=ranks), folder=tmp_path)
    assert ended.status == 0, ended.err
    found = json.loads((tmp_path / str(ranks // 2)).read_text())
    print(found)
    assert found["transport"] == "nccl"
    assert [name for name in NOT_IN_A_STEP if found["step"][name]] == []
    assert found["allocated"] == pytest.approx(planned(model, ranks, side, options), rel=WITHIN)


def planned(model: str, ranks: int, side: int, options: dict[str, Any]) -> int:
    """Bytes on the middle rank, without CUDA's own."""
    known = CARDS.on_hub(model)
    assert known is not None
    about: dict[str, Any] = {
        "module": Module(kind=known[0].parts["transformer"] or "", config=known[1].configs["transformer"]),
        "dtype": "bfloat16",
        "device": "cuda",
        "ranks": ranks,
        "options": Options(**options).settled("full"),
    }
    amounts = {"images": 1, "text_tokens": TEXT, "passes": 1, "steps": 1, "down_factor": 1, "has_lora": False}
    size = {"height": side, "width": side, "rank": ranks // 2}
    step = engine().ask(StepQuestion(transport="nccl", **size, **amounts, **about))
    return engine().ask(WeightsQuestion(**about)).held + sum(step.peak.values())
